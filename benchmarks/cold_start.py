"""Cold start and speed of a bundle beside what one would start by hand: interleaved, on one machine, in one run.

    python benchmarks/cold_start.py BUNDLE --out cold_start.json [--python PYTHON_WITH_LLAMA_CPP_SERVER]

Cases: `edgectl serve` of the bundle; its llama-server started bare, with the best flags, and with a warm-up as it is
without them; and `python -m llama_cpp.server` on the same GGUF. Each from the spawn of the first process to the first
token of text over HTTP, page cache warm, round by round in another order. What happens inside the servers is read off
their own logs.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from toolchain.device import bench, files, measure, meter, probe, serve
from toolchain.device.client import Client
from toolchain.evaluate.bootstrap import ratio_interval

_LIMIT_S = 120.0
_PROMPT = [{"role": "user", "content": "Which command lists files?"}]
_BARE, _WARMED_UP = "bare llama-server", "bare, with warm-up"
_PHASES = (
    ("libraries, backends", r"device_info:"),
    ("listening", r"load_model: loading model"),
    ("vocabulary", r"load_tensors: loading model tensors"),
    ("weights", r"llama_context: constructing"),
    ("keys and values", r"sched_reserve: reserving"),
    ("graph", r"warming up the model"),
    ("warm-up", r"load_model: initializing"),
    ("ready", r"llama_server: model loaded"),
)
"""What is done by the time that the server's log has this line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--starts-only", action="store_true", help="without the speed of answers")
    parser.add_argument("--python", type=Path, help="an interpreter that has llama_cpp.server; left out: without it")
    options = parser.parse_args()
    bundle = files.open_bundle(options.bundle.resolve())
    meter.load([bundle.model, *(path for path in bundle.programs.iterdir() if path.is_file())])
    cases = ["edgectl serve", _BARE, _WARMED_UP, *(["llama_cpp.server"] if options.python else [])]
    samples: dict[str, list[float]] = {case: [] for case in cases}
    phases: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    order = random.Random(0)
    with meter.ForeignCpu() as foreign:
        for _ in range(options.rounds):
            for case in order.sample(cases, len(cases)):
                seconds, log = _start(case, bundle, options.python)
                samples[case].append(seconds)
                phases[case].append(_phases(log))
    base = samples[_BARE]
    # Served answers follow a prompt: llama-bench is asked for the same depth.
    asked = bench.Options(depth=bench.Options().prompt_tokens, clients=(1,), repetitions=9)
    record = {
        "bundle": bundle.id,
        "model_bytes": bundle.manifest["model"]["bytes"],
        "device": probe.probe(),
        "foreign_cpu_share": foreign.share,
        "seconds_to_first_token": {case: measure.summary(values) for case, values in samples.items()},
        "ratio_to_bare": {
            case: {
                "ratio": statistics.median(values) / statistics.median(base),
                "interval": ratio_interval(base, values, seed=0),
            }
            for case, values in samples.items()
        },
        "phases_ms": {case: _medians_ms(found) for case, found in phases.items()},
    }
    if not options.starts_only:
        record["bench"] = bench.run(bundle, asked, lambda line: print(line, file=sys.stderr))
    options.out.write_text(json.dumps(record, indent=2))
    for case, found in record["seconds_to_first_token"].items():
        ratio = record["ratio_to_bare"][case]
        print(f"{case:<20} {1000 * found['p50']:7.0f} ms  × {ratio['ratio']:.2f} {ratio['interval']}")
    for case, found in record["phases_ms"].items():
        print(case, {name: round(value, 1) for name, value in found.items()})
    if not options.starts_only:
        metrics = record["bench"]["metrics"]
        print("served ÷ llama-bench: decode", metrics["served_decode_tps"]["p50"] / metrics["tg128_d512_tps"]["p50"])
        print("served ÷ llama-bench: prefill", metrics["served_prefill_tps"]["p50"] / metrics["pp512_tps"]["p50"])
    print(f"other programs used {foreign.share:.1%} of the processors")


def _start(case: str, bundle: files.Bundle, python: Path | None) -> tuple[float, str]:
    """Seconds from spawn to the first token, and what the program said."""
    port, threads = serve.free_port(), str(serve.threads(bundle))
    model = str(bundle.model)
    bare = [
        *(str(bundle.programs / "llama-server"), "--model", model, "--port", str(port), "--threads", threads),
        *("--ctx-size", str(bundle.manifest["model"]["context"]), "--parallel", "1", "--cache-ram", "0"),
        *("--fit", "off", "--offline", "--no-ui", "--jinja", "--verbosity", "4", "--log-colors", "off"),
    ]
    argv = {
        "edgectl serve": [*_system_python(), str(bundle.root / "edgectl"), "serve", "--port", str(port)],
        _BARE: [*bare, "--no-warmup"],
        _WARMED_UP: bare,
        "llama_cpp.server": [
            *(str(python), "-m", "llama_cpp.server", "--model", model, "--port", str(port), "--n_threads", threads),
            *("--n_ctx", str(bundle.manifest["model"]["context"])),
        ],
    }[case]
    log = Path(f"/tmp/cold_start-{os.getpid()}.log")
    with log.open("w") as out:
        start_s = time.perf_counter()
        child = subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        try:
            _wait_ready(child, port, log)
            answer = Client("127.0.0.1", port, timeout_s=_LIMIT_S).stream_chat(_PROMPT, temperature=0, max_tokens=4)
            return answer.token_at_s[0] - start_s, log.read_text(errors="replace")
        finally:
            child.terminate()
            child.wait()


def _medians_ms(found: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name, _ in _PHASES if all(name in phases for phases in found)]
    return {name: 1000 * statistics.median(phases[name] for phases in found) for name in names}


def _wait_ready(child: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    client = Client("127.0.0.1", port, timeout_s=_LIMIT_S)
    end_s = time.perf_counter() + _LIMIT_S
    while True:
        if child.poll() is not None or time.perf_counter() > end_s:
            raise SystemExit(f"not ready: {log.read_text(errors='replace')[-2000:]}")
        try:
            if client.request("GET", "/v1/models")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.002)


def _system_python() -> list[str]:
    return [getattr(sys, "_base_executable", sys.executable), "-I", "-S"]


def _phases(log: str) -> dict[str, float]:
    """Seconds that each phase took, by the times at the beginning of the log's lines: minutes.seconds.ms.µs."""
    found: dict[str, float] = {}
    before_s = 0.0
    for name, pattern in _PHASES:
        match = re.search(rf"^(\d+)\.(\d+)\.(\d+)\.(\d+) .*{pattern}", log, re.MULTILINE)
        if match is None:
            continue
        minutes, seconds, milli, micro = (int(part) for part in match.groups())
        at_s = 60 * minutes + seconds + milli / 1e3 + micro / 1e6
        found[name] = at_s - before_s
        before_s = at_s
    return found


if __name__ == "__main__":
    main()
