"""Measure the bundle on this machine: llama-bench, the server as a client sees it, cold starts, memory → one record.

Every sample is kept, with the conditions it was taken under. A noisy record is flagged, not dropped.
"""

import contextlib
import json
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import files, meter, probe, serve
from .client import Client, Messages, Streamed
from .errors import DeviceError, UsageError

SCHEMA_VERSION = 1
_MAX_VARIATION = 0.05
_EVICTED_SHARE = 0.01
_WORDS = (  # noqa: SIM905 - thirty words are easier to read as text
    "river stone light paper window garden winter market silver engine bridge letter circle number forest summer "
    "travel music table doctor island simple answer moment corner yellow planet history kitchen weather morning"
).split()


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    repetitions: int = 5
    cold_starts: int = 5
    """Starts with the page cache warm, and as many with it evicted."""
    prompt_tokens: int = 512
    generated_tokens: int = 128

    def check(self, context: int) -> None:
        """Raises UsageError."""
        for field in fields(self):
            least = 2 if field.name == "generated_tokens" else 1
            if getattr(self, field.name) < least:
                flag = "--" + field.name.replace("_", "-")
                raise UsageError(f"{flag} {getattr(self, field.name)}: at least {least}")
        if self.prompt_tokens + self.generated_tokens > context:
            raise UsageError(
                f"{self.prompt_tokens} prompt and {self.generated_tokens} generated tokens do not fit the context",
                hint=f"the bundle serves {context} tokens: lower --prompt-tokens or --generated-tokens",
            )


class _Record:
    """Samples by metric, and foreign processor time by the part of the measurement."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[str, Any]] = {}
        self.foreign: dict[str, float] = {}

    def add(self, name: str, unit: str, samples: Sequence[float]) -> None:
        self.metrics[name] = {"unit": unit, **summary(samples)}

    @contextlib.contextmanager
    def metered(self, part: str) -> Iterator[None]:
        with meter.ForeignCpu() as foreign:
            yield
        self.foreign[part] = foreign.share

    def doubts(self) -> list[str]:
        """Why the figures may not be the machine's own; empty when nothing speaks against them."""
        noisy = [
            f"{part}: other programs used {share:.1%} of the machine's processors"
            for part, share in self.foreign.items()
            if share > meter.MAX_FOREIGN_SHARE
        ]
        unsteady = [
            f"{name}: samples vary by {metric['variation']:.1%}"
            for name, metric in self.metrics.items()
            if metric["variation"] > _MAX_VARIATION
        ]
        return noisy + unsteady


def run(bundle: files.Bundle, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """The record, JSON-able. Raises DeviceError and UsageError."""
    model = bundle.manifest["model"]
    options.check(int(model["context"]) // int(model["parallel"]))
    threads = serve.threads(bundle)
    before = probe.probe()
    _warn_if_busy(say)
    started = time.time()
    record = _Record()
    _llama_bench(bundle, options, threads, record, say)
    memory = _as_served(bundle, options, record, say)
    eviction = _cold_starts(bundle, options, record, say)
    doubts = record.doubts()
    if not eviction["eviction_verified"]:
        doubts.append("the files could not be shown to have left the page cache before the evicted starts")
    emulated = probe.emulated(bundle.manifest["target"]["arch"])
    return {
        "schema_version": SCHEMA_VERSION,
        "measured": emulated is None,
        "emulated": emulated,
        "conclusive": not doubts,
        "inconclusive_because": doubts,
        "bundle": bundle.id,
        "bundle_name": f"{bundle.manifest['name']} {bundle.manifest['version']}",
        "target": bundle.manifest["target"]["name"],
        "llama_cpp_commit": bundle.manifest["runtime"]["llama_cpp_commit"],
        "model": {"file": model["file"], "sha256": model["sha256"], "bytes": model["bytes"]},
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "threads": threads,
        "options": asdict(options),
        "device": before,
        "device_after": {
            key: value
            for key, value in probe.probe().items()
            if key in ("frequencies_hz", "temperatures_c", "load_average_1min", "governor")
        },
        "page_cache": eviction,
        "foreign_cpu_share": record.foreign,
        "memory": memory,
        "metrics": record.metrics,
    }


def _warn_if_busy(say: Callable[[str], None]) -> None:
    """Threads that wait for each other crawl when one of them has no processor to itself: say so before the wait."""
    with meter.ForeignCpu() as foreign:
        time.sleep(1)
    if foreign.share > meter.MAX_FOREIGN_SHARE:
        say(f"other programs use {foreign.share:.0%} of the processors: this will be slow, and inconclusive")


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Samples with p50, p95 and the coefficient of variation (sample deviation / mean; 0 for one sample)."""
    mean = statistics.fmean(samples)
    deviation = statistics.stdev(samples) if len(samples) > 1 else 0.0
    return {
        "samples": list(samples),
        "p50": percentile(samples, 0.50),
        "p95": percentile(samples, 0.95),
        "variation": deviation / mean if mean else 0.0,
    }


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default: rank = share × (n − 1)."""
    ordered = sorted(samples)
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _llama_bench(
    bundle: files.Bundle, options: Options, threads: int, record: _Record, say: Callable[[str], None]
) -> None:
    """Prefill and decode without a server: tokens/s of each repetition, after llama-bench's own warm-up."""
    say(f"llama-bench: {options.repetitions} × pp{options.prompt_tokens}, tg{options.generated_tokens}")
    values = {
        "bundle": str(bundle.root),
        "threads": str(threads),
        "repetitions": str(options.repetitions),
        "prompt_tokens": str(options.prompt_tokens),
        "generated_tokens": str(options.generated_tokens),
    }
    argv = serve.fill(bundle.presets()["bench"]["argv"], values)
    with record.metered("llama-bench"):
        child = serve.spawn(argv, cwd=bundle.root, stderr=subprocess.PIPE)
        try:
            output, errors = child.communicate()
        except BaseException:
            child.kill()
            child.wait()
            raise
    if child.returncode != 0:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        raise DeviceError(f"llama-bench ended with {child.returncode}: {last[:400]}", hint="./edgectl verify")
    try:
        tests = json.loads(output)
    except ValueError:
        raise DeviceError(f"llama-bench wrote no JSON: {output[:200]!r}") from None
    for test in tests:
        name = f"pp{test['n_prompt']}" if test["n_prompt"] else f"tg{test['n_gen']}"
        record.add(f"{name}_tps", "tokens/s", test["samples_ts"])


def _as_served(bundle: files.Bundle, options: Options, record: _Record, say: Callable[[str], None]) -> dict[str, Any]:
    """TTFT, TPOT, prefill and decode over HTTP, and the memory the server took. A prompt is never sent twice."""
    say(f"as served: 1 warm-up and {options.repetitions} repetitions")
    answers = []
    with _server(bundle) as (server, client):
        prompts = [_prompt(client, options.prompt_tokens, seed) for seed in range(options.repetitions + 1)]
        _ask(client, prompts[0], options.generated_tokens)
        with record.metered("as served"):
            for number, prompt in enumerate(prompts[1:], start=1):
                answers.append(_ask(client, prompt, options.generated_tokens))
                say(f"as served: {number} of {options.repetitions}")
        memory = meter.memory_bytes(server.pid)
    record.add("ttft_s", "s", [answer.ttft_s for answer in answers])
    record.add("tpot_s", "s", [answer.tpot_s for answer in answers])
    record.add("served_decode_tps", "tokens/s", [1 / answer.tpot_s for answer in answers])
    record.add("served_prefill_tps", "tokens/s", [answer.timings["prompt_per_second"] for answer in answers])
    return {
        **memory,
        "served_prompt_tokens": [answer.timings["prompt_n"] for answer in answers],
        "served_generated_tokens": [answer.timings["predicted_n"] for answer in answers],
    }


def _cold_starts(bundle: files.Bundle, options: Options, record: _Record, say: Callable[[str], None]) -> dict[str, Any]:
    """Spawn → ready and spawn → first token, with the page cache warm and evicted; how far the eviction went."""
    needed = [bundle.model, *sorted(path for path in bundle.programs.iterdir() if path.is_file())]
    residents: list[float | None] = []
    for state in ("warm", "evicted"):
        say(f"cold start: {options.cold_starts} × page cache {state}")
        ready: list[float] = []
        first: list[float] = []
        with record.metered(f"cold start, {state}"):
            for number in range(options.cold_starts):
                if state == "warm":
                    meter.load(needed)
                else:
                    meter.evict(needed)
                    residents.append(meter.resident_share(needed))
                with _server(bundle) as (server, client):
                    ready.append(server.ready_s)
                    messages = [{"role": "user", "content": f"{_WORDS[number % len(_WORDS)]}?"}]
                    answer = _ask(client, messages, 2)
                    first.append(answer.token_at_s[0] - server.spawned_at_s)
        record.add(f"load_{state}_s", "s", ready)
        record.add(f"cold_start_{state}_s", "s", first)
    verified = all(share is not None and share <= _EVICTED_SHARE for share in residents)
    detail = "checked with mincore" if verified else "could not be verified: treat the evicted figures as warm"
    return {"eviction_verified": verified, "detail": detail, "resident_share_after_eviction": residents}


@contextlib.contextmanager
def _server(bundle: files.Bundle) -> Iterator[tuple[serve.Server, Client]]:
    port = serve.free_port()
    with serve.start(bundle, host="127.0.0.1", port=port) as server:
        server.wait_ready(serve.ready_timeout_s(bundle))
        try:
            yield server, Client("127.0.0.1", port)
        except OSError as error:
            raise DeviceError(f"llama-server no longer answers ({error}): {server.last_error()}") from error


def _ask(client: Client, messages: Messages, tokens: int) -> Streamed:
    """A streamed answer of exactly `tokens` tokens: with eos let through the length would be the model's choice."""
    answer = client.stream_chat(messages, temperature=0, max_tokens=tokens, ignore_eos=True)
    answer.ttft_s  # noqa: B018 - raises when there was no token with content
    return answer


def _prompt(client: Client, tokens: int, seed: int) -> Messages:
    """A user message that renders to at most `tokens` ids and nearly as many, unlike that of any other seed."""
    words = random.Random(seed).choices(_WORDS, k=tokens)  # noqa: S311 - text to read, not a secret

    def message(count: int) -> Messages:
        return [{"role": "user", "content": " ".join([str(seed), *words[:count]])}]

    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(client.prompt_ids(message(middle))) <= tokens else (low, middle - 1)
    return message(low)


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [
        f"{record['bundle_name']} for {record['target']}, {record['bundle'][:19]}…",
        f"{record['device']['board'] or 'unknown board'}, {record['device']['cpu'] or 'unknown processor'}, "
        f"{record['threads']} threads, governor {record['device']['governor'] or 'unknown'}, {record['started_utc']}",
        "",
        f"{'':<24}{'p50':>10}{'p95':>10}  {'unit':<10}{'n':>3}  variation",
    ]
    for name, metric in record["metrics"].items():
        milli = metric["unit"] == "s"
        scale, unit = (1000, "ms") if milli else (1, metric["unit"])
        lines.append(
            f"{name.removesuffix('_s') if milli else name:<24}{metric['p50'] * scale:>10.1f}"
            f"{metric['p95'] * scale:>10.1f}  {unit:<10}{len(metric['samples']):>3}  {metric['variation']:.1%}"
        )
    for name in ("peak_rss_bytes", "pss_bytes"):
        value = record["memory"][name]
        shown = "unknown" if value is None else f"{value / 2**20:.1f}"
        lines.append(f"{name.removesuffix('_bytes'):<24}{shown:>10}{'':>10}  MiB")
    shares = ", ".join(f"{part} {share:.1%}" for part, share in record["foreign_cpu_share"].items())
    lines += ["", f"other programs' share of the processors: {shares}", f"eviction: {record['page_cache']['detail']}"]
    if record["emulated"]:
        lines.append(f"NOT MEASURED ON THE DEVICE: {record['emulated']}")
    lines += [f"inconclusive: {reason}" for reason in record["inconclusive_because"]] or ["conclusive"]
    return "\n".join(lines)
