"""Decoding through a bundle's server beside llama-bench of the same build: a new process of each in every round.

    python benchmarks/served_decode.py BUNDLE [--rounds 30] [--tokens 96] [--depth 64]

Where a process's memory comes to lie changes its speed by up to a tenth for as long as it lives, so that answers of one
server say little. In each round: llama-bench, a server with whole answers and streamed ones, llama-bench. Tokens/s are
those of the server's own clock, over the gaps between tokens; ratios are to the mean of the round's two llama-benches,
with a bootstrap interval of their median.
"""

import argparse
import json
import random
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from toolchain.device import files, meter, serve
from toolchain.device.client import Client

_WORDS = ("river", "stone", "light", "paper", "window", "garden", "winter", "market", "silver", "engine", "bridge")
_ANSWERS = 2
"""Of each kind, in a round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--depth", type=int, default=64, help="tokens of the prompt, about")
    given = parser.parse_args()
    bundle = files.open_bundle(given.bundle.resolve())
    meter.load([bundle.model, *(path for path in bundle.programs.iterdir() if path.is_file())])
    found: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    with meter.ForeignCpu() as foreign:
        for number in range(given.rounds):
            here = {"llama-bench": _llama_bench(bundle, given.tokens, given.depth)}
            here |= _served(bundle, given.tokens, given.depth, number)
            here["llama-bench again"] = _llama_bench(bundle, given.tokens, given.depth)
            base = statistics.fmean(value for name, value in here.items() if name.startswith("llama-bench"))
            for name, value in here.items():
                found.setdefault(name, []).append(value)
                ratios.setdefault(name, []).append(value / base)
    for name, values in found.items():
        low, high = _interval(ratios[name])
        print(
            f"{name:18} {statistics.median(values):8.1f} tokens/s  × {statistics.median(ratios[name]):.3f} "
            f"[{low:.3f}, {high:.3f}]"
        )
    print(f"other programs used {foreign.share:.1%} of the processors")


def _llama_bench(bundle: files.Bundle, tokens: int, depth: int) -> float:
    argv = [
        *(str(bundle.programs / "llama-bench"), "-m", str(bundle.model), "-t", str(serve.threads(bundle)), "-r", "1"),
        *("-p", "0", "-n", str(tokens), "-d", str(depth), "-o", "json"),
    ]
    said = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    return float(said[-1]["samples_ts"][0])


def _served(bundle: files.Bundle, tokens: int, depth: int, number: int) -> dict[str, float]:
    port = serve.free_port()
    with serve.start(bundle, host="127.0.0.1", port=port) as server:
        server.wait_ready(serve.ready_timeout_s(bundle))
        client = Client("127.0.0.1", port)
        _answer(client, "a warm-up", tokens, streamed=False)
        order = ("whole answers", "streamed answers")
        return {
            kind: statistics.fmean(
                _answer(client, _prompt(depth, (number, at)), tokens, streamed=kind == "streamed answers")
                for at in range(_ANSWERS)
            )
            for kind in (order if number % 2 else reversed(order))
        }


def _answer(client: Client, prompt: str, tokens: int, *, streamed: bool) -> float:
    messages = [{"role": "user", "content": prompt}]
    options: dict[str, object] = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    if streamed:
        timings = client.stream_chat(messages, **options).timings
    else:
        body = {"messages": messages, "cache_prompt": False, **options}
        timings = client.post("/v1/chat/completions", body)["timings"]
    # The server's clock starts when the first token is there.
    return float(1000 * (timings["predicted_n"] - 1) / timings["predicted_ms"])


def _prompt(depth: int, seed: tuple[int, int]) -> str:
    return " ".join([str(seed), *random.Random(str(seed)).choices(_WORDS, k=depth * 2 // 3)])


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % of the median, by the bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[100], medians[3899]


if __name__ == "__main__":
    main()
