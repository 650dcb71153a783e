"""The parts of a benchmark: llama-bench, the server as clients see it, cold starts, ten minutes without a pause."""

import contextlib
import itertools
import json
import math
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import energy, files, meter, probe, serve
from .client import Client, Messages, Streamed
from .errors import DeviceError
from .system import HERE, System

if TYPE_CHECKING:
    from .bench import Options

MAX_VARIATION = 0.05
FEWEST_SAMPLES = 5
"""Fewer say next to nothing of how much a figure varies: a single one does not vary at all."""
_EVICTED_SHARE = 0.01
_WATCH_S = 5.0
"""A board throttles for longer, and what it did since boot is compared as well."""
_WINDOW_S = 10.0
_MINUTE = 6
"""Windows of ten seconds."""
_ANSWER_TOKENS = 256
_WORDS = (  # noqa: SIM905 - thirty words are easier to read as text
    "river stone light paper window garden winter market silver engine bridge letter circle number forest summer "
    "travel music table doctor island simple answer moment corner yellow planet history kitchen weather morning"
).split()
Say = Callable[[str], None]


class Throttling:
    """What lowered the clock over a `with` block: asked at its start, every five seconds, and at its end."""

    def __init__(self, system: System = HERE) -> None:
        self._system = system
        self.reasons: list[str] = []
        """Each once, in the order they were seen."""

    def __enter__(self) -> "Throttling":
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        last = False
        while True:
            found = (probe.throttling(self._system) or {}).get("now") or []
            self.reasons += [reason for reason in found if reason not in self.reasons]
            if last:
                return
            last = self._ended.wait(_WATCH_S)


class Record:
    """Samples by metric; foreign processor time and throttling by the part of the measurement."""

    def __init__(self, *, measured: bool) -> None:
        self.measured = measured
        """Whether the figures are this machine's own, and not those of an emulation."""
        self.metrics: dict[str, dict[str, Any]] = {}
        self.foreign: dict[str, float] = {}
        self.throttled: dict[str, list[str]] = {}
        """Parts in which the clock was held down, and by what."""
        self._unlike: set[str] = set()

    def add(self, name: str, unit: str, samples: Sequence[float], *, alike: bool = True) -> None:
        """`alike`: the samples are of the same thing, so that what they vary by is noise."""
        self.metrics[name] = {"unit": unit, "measured": self.measured, **summary(samples)}
        if not alike:
            self._unlike.add(name)

    @contextlib.contextmanager
    def metered(self, part: str) -> Iterator[None]:
        with meter.ForeignCpu() as foreign, Throttling() as throttling:
            yield
        self.foreign[part] = foreign.share
        if throttling.reasons:
            self.throttled[part] = throttling.reasons

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
            if metric["variation"] > MAX_VARIATION and name not in self._unlike
        ]
        few = [doubt for name, metric in self.metrics.items() if (doubt := too_few(name, metric["samples"]))]
        still = [f"{name}: mostly nothing came" for name, metric in self.metrics.items() if metric["p50"] == 0]
        return noisy + few + unsteady + still


def too_few(name: str, samples: Sequence[float]) -> str | None:
    """That there are too few samples, and how many it takes."""
    if len(samples) >= FEWEST_SAMPLES:
        return None
    return f"{name}: {len(samples)} sample{'' if len(samples) == 1 else 's'}, at least {FEWEST_SAMPLES} are needed"


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


def llama_bench(bundle: files.Bundle, options: "Options", threads: int, record: Record, say: Say) -> None:
    """Prefill and decode without a server, and decode after a long prompt: tokens/s of each repetition.

    llama-bench makes a warm-up of its own. A bundle whose context has no room for the long prompt has no such figure.
    """
    context = int(bundle.manifest["model"]["context"])
    say(f"llama-bench: {options.repetitions} × pp{options.prompt_tokens}, tg{options.generated_tokens}")
    with record.metered("llama-bench"):
        _llama_bench(bundle, options, threads, record, prompt_tokens=options.prompt_tokens, depth=0)
        depth = options.depth_within(context)
        if depth:
            say(f"llama-bench: {options.repetitions} × tg{options.generated_tokens} after {depth} tokens")
            _llama_bench(bundle, options, threads, record, prompt_tokens=0, depth=depth)


def _llama_bench(
    bundle: files.Bundle, options: "Options", threads: int, record: Record, *, prompt_tokens: int, depth: int
) -> None:
    values = {
        "bundle": str(bundle.root),
        "threads": str(threads),
        "repetitions": str(options.repetitions),
        "prompt_tokens": str(prompt_tokens),
        "generated_tokens": str(options.generated_tokens),
        "depth": str(depth),
    }
    argv = serve.fill(bundle.presets()["bench"]["argv"], values)
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
        record.add(f"{name}{f'_d{depth}' if depth else ''}_tps", "tokens/s", test["samples_ts"])


def as_served(bundle: files.Bundle, options: "Options", record: Record, say: Say) -> dict[str, Any]:
    """TTFT, TPOT, prefill and decode over HTTP, and the memory the server took. A prompt is never sent twice."""
    say(f"as served: 1 warm-up and {options.repetitions} repetitions")
    answers = []
    with _server(bundle) as (server, client):
        prompts = [_prompt(client, options.prompt_tokens, seed) for seed in range(options.repetitions + 1)]
        _ask(client, prompts[0], options.generated_tokens)
        with record.metered("as served"), energy.Meter() as used:
            for number, prompt in enumerate(prompts[1:], start=1):
                answers.append(_ask(client, prompt, options.generated_tokens))
                say(f"as served: {number} of {options.repetitions}")
        _many_clients(client, options, record, say)
        memory = meter.memory_bytes(server.pid)
    record.add("ttft_s", "s", [answer.ttft_s for answer in answers])
    record.add("tpot_s", "s", [answer.tpot_s for answer in answers])
    record.add("served_decode_tps", "tokens/s", [1 / answer.tpot_s for answer in answers])
    record.add("served_prefill_tps", "tokens/s", [answer.timings["prompt_per_second"] for answer in answers])
    return {
        "measured": record.measured,
        **memory,
        "served_prompt_tokens": [answer.timings["prompt_n"] for answer in answers],
        "served_generated_tokens": [answer.timings["predicted_n"] for answer in answers],
        "energy_source": used.source,
        "joules_per_generated_token": _per_token(used.joules, sum(answer.timings["predicted_n"] for answer in answers)),
    }


def _many_clients(client: Client, options: "Options", record: Record, say: Say) -> None:
    """TTFT and TPOT of clients that ask at the same time; what has no slot of the server waits in its queue."""
    for clients in options.clients[1:]:
        say(f"as served: {clients} clients at once")
        seeds = range(1000 * clients, 1000 * clients + clients * options.repetitions)
        prompts = [_prompt(client, options.prompt_tokens, seed) for seed in seeds]
        answers: list[Streamed] = []
        failures: list[BaseException] = []
        taken_s: list[float] = []
        with record.metered(f"{clients} clients"):
            for turn in range(options.repetitions):
                start_s = time.perf_counter()
                answers += _at_once(client, prompts[turn * clients : (turn + 1) * clients], options, failures)
                taken_s.append(time.perf_counter() - start_s)
        if failures:
            raise failures[0]
        # Of those who ask at once one is answered first.
        record.add(f"ttft_{clients}_clients_s", "s", [answer.ttft_s for answer in answers], alike=False)
        record.add(f"tpot_{clients}_clients_s", "s", [answer.tpot_s for answer in answers])
        each = [clients * options.generated_tokens / seconds for seconds in taken_s]
        record.add(f"served_{clients}_clients_tps", "tokens/s", each)


def _at_once(
    client: Client, prompts: list[Messages], options: "Options", failures: list[BaseException]
) -> list[Streamed]:
    answers: list[Streamed] = []

    def ask(prompt: Messages) -> None:
        try:
            answers.append(_ask(client, prompt, options.generated_tokens))
        except (OSError, DeviceError) as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def sustained(bundle: files.Bundle, minutes: float, record: Record, say: Say) -> dict[str, Any]:
    """Answers without a pause: tokens/s of every ten seconds, with clock and temperature beside them.

    `last_to_first` is 1 on a device that does not slow down.
    """
    say(f"sustained: {minutes:g} minutes of answers")
    arrived: list[tuple[float, int]] = []
    states: list[dict[str, Any]] = []
    room = int(bundle.manifest["model"]["context"]) // int(bundle.manifest["model"]["parallel"])
    tokens = max(2, min(_ANSWER_TOKENS, room - 64))
    with _server(bundle) as (_, client), record.metered("sustained"), energy.Meter() as used:
        start_s = time.perf_counter()
        number, said = 0, 0
        while (now_s := time.perf_counter() - start_s) < minutes * 60:
            if now_s >= len(states) * _WINDOW_S:
                states.append({"at_s": round(now_s, 1), **probe.state()})
            if now_s >= (said + 1) * 60:
                said += 1
                say(f"sustained: {said} of {minutes:g} minutes")
            answer = _ask(client, [{"role": "user", "content": f"{number} {_WORDS[number % len(_WORDS)]}?"}], tokens)
            counts = [0, *answer.token_number]
            produced = [after - before for before, after in itertools.pairwise(counts)]
            arrived += [(at_s - start_s, count) for at_s, count in zip(answer.token_at_s, produced, strict=True)]
            number += 1
    rates = per_window(arrived, minutes * 60)
    record.add("sustained_tps", "tokens/s", rates)
    total = sum(count for _, count in arrived)
    return {
        "measured": record.measured,
        "minutes": minutes,
        "last_to_first": last_to_first(rates),
        "tokens": total,
        "states": states,
        "energy_source": used.source,
        "joules_per_generated_token": _per_token(used.joules, total),
    }


def last_to_first(rates: Sequence[float]) -> float | None:
    """Median rate of the last minute ÷ that of the first, or of the halves where there are no two minutes.

    None where the first has windows without a token, most of them: nothing has a ratio to 0.
    """
    ends = min(_MINUTE, max(1, len(rates) // 2))
    first = statistics.median(rates[:ends])
    return statistics.median(rates[-ends:]) / first if first else None


def _per_token(joules: float | None, tokens: int) -> float | None:
    return joules / tokens if joules is not None and tokens else None


def per_window(arrived: Sequence[tuple[float, int]], end_s: float) -> list[float]:
    """Tokens/s of each whole window of ten seconds up to `end_s`, from (second, tokens) as they came."""
    windows = [0] * max(1, int(end_s // _WINDOW_S))
    for at_s, count in arrived:
        if at_s < len(windows) * _WINDOW_S:
            windows[int(at_s // _WINDOW_S)] += count
    return [count / _WINDOW_S for count in windows]


def cold_starts(bundle: files.Bundle, options: "Options", record: Record, say: Say) -> dict[str, Any]:
    """Spawn → ready and spawn → first token, with the page cache warm and evicted; how far the eviction went."""
    needed = [bundle.model, *sorted(path for path in bundle.programs.iterdir() if path.is_file())]
    residents: list[float | None] = []
    major_faults: dict[str, list[int | None]] = {"warm": [], "evicted": []}
    for state in ("warm", "evicted"):
        say(f"cold start: {options.cold_starts} × page cache {state}")
        listening: list[float] = []
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
                    listening.append(server.listening_s)
                    ready.append(server.ready_s)
                    messages = [{"role": "user", "content": f"{_WORDS[number % len(_WORDS)]}?"}]
                    answer = _ask(client, messages, 2)
                    first.append(answer.token_at_s[0] - server.spawned_at_s)
                    major_faults[state].append(meter.major_faults(server.pid))
        record.add(f"listening_{state}_s", "s", listening)
        record.add(f"load_{state}_s", "s", ready)
        record.add(f"cold_start_{state}_s", "s", first)
    verified = all(share is not None and share <= _EVICTED_SHARE for share in residents)
    detail = "checked with mincore" if verified else "could not be verified: treat the evicted figures as warm"
    return {
        "measured": record.measured,
        "eviction_verified": verified,
        "detail": detail,
        "resident_share_after_eviction": residents,
        "major_faults": major_faults,
    }


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
