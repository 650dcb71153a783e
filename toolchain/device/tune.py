"""Find server settings that are faster on this very machine, and keep them only when they are no worse in anything.

Successive halving around the presets: one change at a time, then combinations of those that helped, each as clients see
it, with the presets measured again and again in between. What wins is compared with the presets once more, in pairs.
The record says what was tried and why it was dropped; `serve` uses what was accepted (tuned.py).
"""

import contextlib
import fcntl
import itertools
import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import cores, files, meter, place, probe, serve, tuned
from .client import Client, Messages
from .errors import BusyError, DeviceError, UsageError
from .measure import percentile

Say = Callable[[str], None]
_PROMPT_TOKENS = 256
_GENERATED_TOKENS = 64
_GOLDEN_PROMPTS = 8
_DECODED_PROMPTS = 4
_SINGLE_REPETITIONS, _HALF_REPETITIONS, _LAST_REPETITIONS = 1, 2, 3
_PAIR_REPETITIONS = 2
_BLOCK_S = 1.5
"""A server is asked again until it has been asked for so long: single answers of a fast one differ by a fifth."""
_FEWEST_PAIRS, _MOST_PAIRS = 5, 12
_BETWEEN_PRESETS = 3
"""Candidates that are measured between two measurements of the presets."""
_COMBINED = 3
_FEWEST_OF_MANY = 4
"""Threads, where a machine has many cores."""
_SEARCH_SHARE = 0.6
"""Of the time; the rest is for the comparison that decides."""
_LIMIT_OF_PRESET, _LIMIT_EXTRA_S = 3.0, 5.0
"""A candidate that takes so much longer than the presets is broken off."""
_STOP_S = 2.0
"""Kept free at the end: servers are stopped and the record is written."""
MEMORY_LIMIT, COLD_START_LIMIT = 1.1, 1.2
"""Of the presets' own figures."""
_RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Options:
    """How the search is done."""

    minutes: float = 5.0
    max_memory_mib: int | None = None
    """Peak resident set that is allowed; None: 1.1 × the presets'."""
    again: bool = False
    under_load: bool = False
    """Accept what was found while other programs used the processors: they always do on this machine."""

    def check(self) -> None:
        """Raises UsageError."""
        if not 0 < self.minutes <= 1440:
            raise UsageError(f"--minutes {self.minutes:g}: more than 0, at most 1440")
        if self.max_memory_mib is not None and self.max_memory_mib < 1:
            raise UsageError(f"--max-memory-mib {self.max_memory_mib}: at least 1")


@dataclass(frozen=True)
class Machine:
    """What the search space depends on."""

    physical_cores: int
    logical_cpus: int
    gpu: bool
    """The bundle's programs compute on one."""


@dataclass(frozen=True)
class Candidate:
    """A change of the presets' command; the empty one is the presets themselves."""

    threads: int | None = None
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return " ".join([*threads, *self.arguments]) or "presets"

    def with_(self, other: "Candidate") -> "Candidate | None":
        """Both changes together; None when they are about the same thing."""
        if self.threads is not None and other.threads is not None:
            return None
        arguments = (*self.arguments, *other.arguments)
        given = tuned.flags(arguments) or []
        if len(given) != len(set(given)):
            return None
        return Candidate(self.threads if self.threads is not None else other.threads, arguments)


PRESETS = Candidate()


def space(machine: Machine, preset_argv: Sequence[str], preset_threads: int, prompt_tokens: int) -> list[Candidate]:
    """Every single change that makes sense here, the likeliest gains first: the time may not suffice for all."""
    counts = [machine.physical_cores, machine.physical_cores - 1, machine.logical_cpus]
    threads = [count for count in dict.fromkeys(counts) if count >= 1 and count != preset_threads]
    found = [Candidate(threads=count) for count in threads]
    found += [Candidate(arguments=("--threads-batch", str(count))) for count in threads if count > preset_threads]
    # A token of a small model does not give many cores enough to do; a prompt does.
    for count in (machine.physical_cores // 2, machine.physical_cores // 4):
        if _FEWEST_OF_MANY <= count < preset_threads and count not in threads:
            prompts = ("--threads-batch", str(preset_threads))
            found += [Candidate(threads=count), Candidate(threads=count, arguments=prompts)]
    if not machine.gpu:
        # On a GPU weights are not repacked. Repacked is the default.
        found.append(Candidate(arguments=("--no-repack",)))
    elif (layers := _value(preset_argv, "--n-gpu-layers")) is not None and layers != "all":
        found.append(Candidate(arguments=("--n-gpu-layers", "all")))
    # "auto", the default, is "on" wherever the backend can do it.
    found.append(Candidate(arguments=("--flash-attn", "off")))
    # Values can be quantised only for flash attention.
    found.append(Candidate(arguments=("--cache-type-k", "q8_0", "--cache-type-v", "q8_0", "--flash-attn", "on")))
    # Speculation with a memory that outlives a request (ngram-mod, ngram-cache) would know our prompts by heart.
    found += [Candidate(arguments=("--spec-type", kind)) for kind in ("ngram-simple", "ngram-map-k")]
    # 512 is the default; a larger batch than the prompt makes no difference.
    found += [Candidate(arguments=("--ubatch-size", str(size))) for size in (128, 256) if size < prompt_tokens]
    # "auto", the default, maps the file. What locks it needs a right that the service does not have.
    found.append(Candidate(arguments=("--load-mode", "none")))
    return found


def _value(argv: Sequence[str], flag: str) -> str | None:
    return argv[argv.index(flag) + 1] if flag in argv else None


def upper_half(ratios: Mapping[Candidate, float]) -> list[Candidate]:
    """The better half, at least one of those that there are; the best first."""
    ranked = sorted(ratios, key=lambda candidate: -ratios[candidate])
    return ranked[: math.ceil(len(ranked) / 2)]


def combinations(winners: Sequence[Candidate]) -> list[Candidate]:
    """The first few winners, given best first, two and three together, where they can be."""
    found: list[Candidate] = []
    for count in (2, 3):
        for chosen in itertools.combinations(winners[:_COMBINED], count):
            together: Candidate | None = PRESETS
            for candidate in chosen:
                together = together.with_(candidate) if together is not None else None
            if together is not None:
                found.append(together)
    return found


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of paired ratios, with a percentile bootstrap interval (Efron 1979) of the pairs."""
    logs = [math.log(ratio) for ratio in ratios]
    chance = random.Random(0)  # noqa: S311 - the same record gives the same interval
    means = [statistics.fmean(chance.choices(logs, k=len(logs))) for _ in range(_RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    bounds = (statistics.fmean(logs), percentile(means, tail), percentile(means, 1 - tail))
    gain, low, high = (math.exp(value) for value in bounds)
    return gain, low, high


def same_answers(answers: Sequence[str], others: Sequence[str]) -> int:
    """How many prompts are answered with the same text."""
    return sum(answer == other for answer, other in zip(answers, others, strict=True))


@dataclass
class Block:
    """One start of a server and what was measured of it."""

    score_s: list[float]
    """Of each chat: time of a prompt of `prompt_tokens` to its first token, and of 63 more tokens of an answer."""
    ttft_s: list[float]
    tpot_s: list[float]
    cold_start_s: float
    """Spawn → first token, page cache warm."""
    peak_rss_bytes: int | None
    foreign_cpu_share: float
    seconds: float
    answers: list[str] = field(default_factory=list)


@dataclass
class Trial:
    """A candidate's way through the search."""

    candidate: Candidate
    blocks: list[Block] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """The presets' time / its own, of each round."""
    same: int | None = None
    """Golden prompts that it answers as the presets do."""
    dropped: str | None = None


def over_memory(blocks: Sequence[Block], presets: Sequence[Block], max_memory_mib: int | None) -> str | None:
    """That a candidate takes more memory than is allowed."""
    taken, usual = (max(block.peak_rss_bytes or 0 for block in part) for part in (blocks, presets))
    limit = MEMORY_LIMIT * usual if max_memory_mib is None else max_memory_mib * 2**20
    if taken <= limit:
        return None
    return f"takes {taken / 2**20:.0f} MiB of memory, {limit / 2**20:.0f} are allowed"


def slow_start(blocks: Sequence[Block], usual_s: float) -> str | None:
    """That a candidate starts more slowly than is allowed. The least of several starts counts: noise only adds."""
    start_s = min(block.cold_start_s for block in blocks)
    if start_s <= COLD_START_LIMIT * usual_s:
        return None
    return f"starts cold in {start_s:.2f} s, the presets in {usual_s:.2f} s"


@dataclass
class Pair:
    """The presets and what is to replace them, one after the other."""

    presets: Block
    tuned: Block

    @property
    def ratio(self) -> float:
        return percentile(self.presets.score_s, 0.5) / percentile(self.tuned.score_s, 0.5)


class _LateError(Exception):
    """The time is up."""


class _Search:
    """One bundle on this machine, with everything that was measured so far."""

    def __init__(self, bundle: files.Bundle, options: Options, say: Say) -> None:
        self.bundle, self.options, self.say = bundle, options, say
        self.started_s = time.monotonic()
        self.end_s = self.started_s + 60 * options.minutes - _STOP_S
        self.search_end_s = self.started_s + _SEARCH_SHARE * 60 * options.minutes
        model = bundle.manifest["model"]
        self.room = int(model["context"]) // int(model["parallel"])
        self.prompt_tokens = min(_PROMPT_TOKENS, self.room - _GENERATED_TOKENS)
        self.golden = bundle.golden()[:_GOLDEN_PROMPTS]
        if not self.golden:
            raise DeviceError("the bundle has no golden prompts: it could not be told whether answers change")
        self.prompt: Messages = []
        self.decoded: list[dict[str, Any]] = []
        """The golden prompts with the longest answers: their tokens are timed."""
        self.presets: list[Block] = []
        self.reference: list[str] = []
        self.answers_s = 0.0
        """Time of a start with which every golden prompt is answered."""
        self.reference_same: int | None = None
        """Golden prompts that are answered the same with another number of threads."""
        self.trials: dict[Candidate, Trial] = {}
        self.pairs: list[Pair] = []

    def block(self, candidate: Candidate, repetitions: int, end_s: float, *, answers: bool = False) -> Block:
        """Start a server, ask it, stop it. Raises DeviceError when it fails, _LateError when the time is up."""
        start_s = time.monotonic()
        limit_s = end_s - start_s
        if candidate != PRESETS:
            usual_s = max(block.seconds for block in self.presets[-2:]) + (self.answers_s if answers else 0.0)
            limit_s = min(limit_s, _LIMIT_OF_PRESET * usual_s + _LIMIT_EXTRA_S)
        if limit_s <= 0:
            raise _LateError
        port = serve.free_port()
        try:
            with (
                meter.ForeignCpu() as foreign,
                serve.start(
                    self.bundle,
                    host="127.0.0.1",
                    port=port,
                    thread_count=candidate.threads,
                    extra=candidate.arguments,
                ) as server,
                _broken_off(server, limit_s) as broken_off,
            ):
                try:
                    server.wait_ready(min(limit_s, serve.ready_timeout_s(self.bundle)))
                    block = self._asked(Client("127.0.0.1", port), server, repetitions, answers)
                except OSError as error:
                    raise DeviceError(f"llama-server no longer answers ({error}): {server.last_error()}") from error
        except DeviceError as error:
            if time.monotonic() >= end_s:
                raise _LateError from None
            if broken_off.is_set():
                raise DeviceError(f"broken off after {limit_s:.0f} s: far slower than the presets") from None
            raise error
        block.foreign_cpu_share = foreign.share
        block.seconds = time.monotonic() - start_s
        return block

    def _asked(self, client: Client, server: serve.Server, repetitions: int, answers: bool) -> Block:
        first = client.stream_chat(self.golden[0]["messages"], temperature=0, max_tokens=1, ignore_eos=True)
        cold_start_s = first.sent_at_s + first.ttft_s - server.spawned_at_s
        ttft_s: list[float] = []
        tpot_s: list[float] = []
        started_s = time.monotonic()
        while (number := len(ttft_s)) < repetitions or (number > 0 and time.monotonic() - started_s < _BLOCK_S):
            read = client.stream_chat(self.prompt, temperature=0, max_tokens=1, ignore_eos=True)
            ttft_s.append(read.ttft_s)
            # An answer to its end and no further: behind it models repeat themselves, which flatters speculation.
            prompt = self.decoded[number % len(self.decoded)]
            tpot_s.append(client.stream_chat(prompt["messages"], **self._greedy(prompt)).tpot_s)
        peak_rss_bytes = meter.memory_bytes(server.pid)["peak_rss_bytes"]
        said = [client.stream_chat(prompt["messages"], **self._greedy(prompt)) for prompt in self.golden if answers]
        if not self.prompt:
            self._choose(client, [len(answer.token_at_s) for answer in said])
        return Block(
            score_s=[first + (_GENERATED_TOKENS - 1) * gap for first, gap in zip(ttft_s, tpot_s, strict=True)],
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            cold_start_s=cold_start_s,
            peak_rss_bytes=peak_rss_bytes,
            foreign_cpu_share=math.nan,
            seconds=math.nan,
            answers=[answer.text for answer in said],
        )

    def _choose(self, client: Client, lengths: Sequence[int]) -> None:
        """The prompt to read, of the golden prompts' words, and the golden prompts whose answers are timed.

        `lengths` are the tokens of the presets' answers.
        """
        words = " ".join(prompt["messages"][-1]["content"] for prompt in self.golden).split()
        low, high = 1, self.prompt_tokens
        while low < high:
            middle = (low + high + 1) // 2
            fits = len(client.prompt_ids(_message(words, middle))) <= self.prompt_tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        self.prompt = _message(words, low)
        longest = sorted(range(len(lengths)), key=lambda number: -lengths[number])[:_DECODED_PROMPTS]
        self.decoded = [self.golden[number] for number in longest if lengths[number] > 1]
        if not self.decoded:
            raise DeviceError("no golden prompt is answered with more than one token: there is no speed to measure")

    def _greedy(self, prompt: dict[str, Any]) -> dict[str, Any]:
        room = self.room - len(prompt["prompt_ids"])
        return {"temperature": 0, "seed": 0, "max_tokens": max(2, min(_GENERATED_TOKENS, room))}

    def preset(self, repetitions: int) -> Block:
        self.presets.append(self.block(PRESETS, repetitions, self.search_end_s))
        return self.presets[-1]

    def base(self) -> None:
        """The presets' own answers, and how many of them another number of threads leaves as they are."""
        self.say("measuring the presets")
        # The first start chooses what is asked of all that follow.
        first = self.block(PRESETS, 0, self.search_end_s, answers=True)
        self.reference, self.answers_s = first.answers, first.seconds
        self.presets.append(self.block(PRESETS, _SINGLE_REPETITIONS, self.search_end_s))
        threads = serve.threads(self.bundle)
        other = Candidate(threads=threads - 1 if threads > 1 else min(2, len(cores.usable_cpus())))
        try:
            answers = self.block(other, 0, self.search_end_s, answers=True).answers
        except DeviceError:
            answers = self.reference  # nothing is known to change them: all have to be the same
        self.reference_same = same_answers(answers, self.reference)
        busy = self.presets[0].foreign_cpu_share
        if busy > meter.MAX_FOREIGN_SHARE and not self.options.under_load:
            self.say(f"other programs use {busy:.0%} of the processors: what is found now will not be kept")

    def round(self, candidates: Sequence[Candidate], repetitions: int, *, answers: bool = False) -> None:
        """Measure each candidate between two measurements of the presets. Raises _LateError with what it has."""
        for start in range(0, len(candidates), _BETWEEN_PRESETS):
            around = [self.preset(repetitions)]
            done: list[tuple[Trial, Block]] = []
            try:
                for candidate in candidates[start : start + _BETWEEN_PRESETS]:
                    trial = self.trials.setdefault(candidate, Trial(candidate))
                    try:
                        block = self.block(
                            candidate, repetitions, self.search_end_s, answers=answers and trial.same is None
                        )
                    except DeviceError as error:
                        trial.dropped = error.message
                        self.say(f"{candidate}: dropped: {trial.dropped}")
                    else:
                        done.append((trial, block))
                around.append(self.preset(repetitions))
            finally:
                usual_s = statistics.fmean(percentile(block.score_s, 0.5) for block in around)
                for trial, block in done:
                    self._judge(trial, block, usual_s)

    def _judge(self, trial: Trial, block: Block, usual_s: float) -> None:
        trial.blocks.append(block)
        trial.ratios.append(usual_s / percentile(block.score_s, 0.5))
        if block.answers:
            trial.same = same_answers(block.answers, self.reference)
        trial.dropped = (
            over_memory(trial.blocks, self.presets, self.options.max_memory_mib)
            # One start or two against many: only what is slower than the slowest is out already.
            or slow_start(trial.blocks, max(block.cold_start_s for block in self.presets))
            or self.other_answers(trial)
        )
        self.say(
            f"{trial.candidate}: {trial.ratios[-1]:.2f} × as fast" + (f", {trial.dropped}" if trial.dropped else "")
        )

    def other_answers(self, trial: Trial) -> str | None:
        if trial.same is None or self.reference_same is None or trial.same >= self.reference_same:
            return None
        return (
            f"changes answers: {trial.same} of {len(self.golden)} golden prompts are answered as with the presets, "
            f"{self.reference_same} by another number of threads"
        )

    def left(self, *, least_ratio: float = 0.0) -> dict[Candidate, float]:
        """Candidates that are not dropped, with the ratio of their last, longest round."""
        return {
            candidate: trial.ratios[-1]
            for candidate, trial in self.trials.items()
            if trial.dropped is None and trial.ratios and trial.ratios[-1] > least_ratio
        }

    def keep(self, kept: Sequence[Candidate]) -> None:
        """Drop what is not kept."""
        for candidate in self.left():
            if candidate not in kept:
                self.trials[candidate].dropped = "others were faster"

    def halve(self, singles: Sequence[Candidate]) -> None:
        """The search. Raises _LateError with what it has."""
        self.round(singles, _SINGLE_REPETITIONS)
        self.keep(upper_half(self.left()))
        self.round(list(self.left()), _HALF_REPETITIONS, answers=True)
        winners = upper_half(self.left(least_ratio=1.0))
        together = combinations(winners)
        if together:
            self.keep(winners)
            self.round([*winners, *together], _LAST_REPETITIONS, answers=True)

    def best(self) -> Trial | None:
        """The fastest one left that answers as the presets do. Raises _LateError."""
        faster = self.left(least_ratio=1.0)
        for candidate in sorted(faster, key=lambda candidate: -faster[candidate]):
            trial = self.trials[candidate]
            if trial.same is None:
                try:
                    block = self.block(candidate, 0, self.end_s, answers=True)
                except DeviceError as error:
                    trial.dropped = error.message
                    continue
                trial.same = same_answers(block.answers, self.reference)
                trial.dropped = self.other_answers(trial)
            if trial.dropped is None:
                return trial
        return None

    def compare(self, candidate: Candidate) -> None:
        """The pairs that decide: two new servers each time, so that what differs from start to start is in them."""
        seconds = [max(block.seconds for block in blocks) for blocks in (self.presets, self.trials[candidate].blocks)]
        fit = int((self.end_s - time.monotonic()) / sum(seconds))
        if fit < _FEWEST_PAIRS:
            raise _LateError
        for number in range(min(fit, _MOST_PAIRS)):
            self.say(f"presets against {candidate}: pair {number + 1} of {min(fit, _MOST_PAIRS)}")
            order = (PRESETS, candidate) if number % 2 == 0 else (candidate, PRESETS)
            blocks = {which: self.block(which, _PAIR_REPETITIONS, self.end_s) for which in order}
            self.pairs.append(Pair(blocks[PRESETS], blocks[candidate]))


def verdict(
    pairs: Sequence[Pair], *, max_memory_mib: int | None = None, under_load: bool = False
) -> tuple[str | None, bool]:
    """Why the presets stay in spite of these pairs (None: they do not), and whether that is the machine's own."""
    foreign = foreign_share(pairs)
    if len(pairs) < _FEWEST_PAIRS:
        return f"there was no time for {_FEWEST_PAIRS} pairs", False
    if foreign > meter.MAX_FOREIGN_SHARE and not under_load:
        return f"other programs used {foreign:.0%} of the processors", False
    new, old = [pair.tuned for pair in pairs], [pair.presets for pair in pairs]
    over = over_memory(new, old, max_memory_mib) or slow_start(new, min(block.cold_start_s for block in old))
    if over is not None:
        return over, True
    gain, low, high = interval([pair.ratio for pair in pairs])
    if low <= 1:
        return f"the best was {gain:.3f} × as fast, {low:.3f} to {high:.3f}: no gain is certain", True
    return None, True


def foreign_share(pairs: Sequence[Pair]) -> float:
    """Of other programs, over all pairs; 0 without any."""
    blocks = [block for pair in pairs for block in (pair.presets, pair.tuned)]
    seconds = sum(block.seconds for block in blocks)
    return sum(block.foreign_cpu_share * block.seconds for block in blocks) / seconds if seconds else 0.0


def run(
    bundle: files.Bundle, home: Path, options: Options, say: Say, *, candidates: Sequence[Candidate] | None = None
) -> dict[str, Any]:
    """The record, new or of an earlier time, which lies in `home`. `candidates` stand in for the search space.

    Raises DeviceError, UsageError, BusyError.
    """
    options.check()
    emulated = probe.emulated(bundle.manifest["target"]["arch"])
    if emulated is not None:
        raise DeviceError(f"nothing to tune: {emulated}", hint="tune on the device itself")
    before = probe.probe()
    device = tuned.fingerprint(before)
    path = tuned.record_path(home, bundle.id, device)
    with _alone(path.parent):
        earlier = _earlier(home, bundle, device, say)
        if earlier is not None and not options.again:
            say(f"tuned already, {earlier['started_utc']}: {path}; --again measures anew")
            return earlier
        record = _measured(bundle, before, device, options, say, candidates)
        if not record["conclusive"] and earlier is not None:
            say(f"this was inconclusive: what was found {earlier['started_utc']} stays in use")
        else:
            place.replace_json(path, record)
        return record


def _earlier(home: Path, bundle: files.Bundle, device: str, say: Say) -> dict[str, Any] | None:
    """What was found before, if it was conclusive."""
    try:
        found = tuned.read(home, bundle, device)
    except DeviceError as error:
        say(f"{error.message}: it is replaced")
        return None
    return found if found is not None and found["conclusive"] else None


def _measured(
    bundle: files.Bundle,
    before: dict[str, Any],
    device: str,
    options: Options,
    say: Say,
    candidates: Sequence[Candidate] | None,
) -> dict[str, Any]:
    started = time.time()
    search = _Search(bundle, options, say)
    threads = serve.threads(bundle)
    if candidates is None:
        machine = Machine(
            physical_cores=before["physical_cores"],
            logical_cpus=_granted(before),
            gpu=bundle.manifest["runtime"]["backend"] != "CPU",
        )
        candidates = space(machine, bundle.presets()["server"]["argv"], threads, search.prompt_tokens)
    best, late = None, False
    try:
        search.base()
        search.halve(candidates)
    except _LateError:
        late = True
    try:
        if search.reference_same is not None:
            best = search.best()
        if best is not None:
            search.compare(best.candidate)
    except _LateError:
        late = True
    except DeviceError as error:
        assert best is not None
        best.dropped, best = error.message, None
    stay: str | None
    if best is None:
        stay = "there was no time: --minutes" if late else "nothing was faster"
        conclusive = not late
    else:
        stay, conclusive = verdict(search.pairs, max_memory_mib=options.max_memory_mib, under_load=options.under_load)
        conclusive = conclusive and (stay is None or not late)
        best.dropped = stay
    after = probe.probe()
    if tuned.fingerprint(after) != device:
        stay, conclusive = "the machine changed meanwhile, as by another power mode", False
    settings = None
    if best is not None and stay is None:
        gain, low, high = interval([pair.ratio for pair in search.pairs])
        chosen = best.candidate
        settings = {
            "arguments": list(chosen.arguments),
            "threads": threads if chosen.threads is None else chosen.threads,
            "gain": gain,
            "interval": [low, high],
            "confidence": CONFIDENCE,
            "device": device,
            "bundle": bundle.id,
        }
    return {
        "schema_version": tuned.SCHEMA_VERSION,
        "bundle": bundle.id,
        "bundle_name": f"{bundle.manifest['name']} {bundle.manifest['version']}",
        "llama_cpp_commit": bundle.manifest["runtime"]["llama_cpp_commit"],
        "device": device,
        "machine": before,
        "machine_after": after,
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.monotonic() - search.started_s, 1),
        "options": asdict(options),
        "chat": {"prompt_tokens": search.prompt_tokens, "generated_tokens": _GENERATED_TOKENS},
        "golden_prompts": len(search.golden),
        "same_with_other_threads": search.reference_same,
        "presets": {"threads": threads, "blocks": [asdict(block) for block in search.presets]},
        "candidates": [asdict(trial) for trial in search.trials.values()],
        "not_tried": [asdict(candidate) for candidate in candidates if candidate not in search.trials],
        "pairs": [{**asdict(pair), "ratio": pair.ratio} for pair in search.pairs],
        "foreign_cpu_share": foreign_share(search.pairs),
        "complete": not late,
        "conclusive": conclusive,
        "presets_stay_because": stay,
        "tuned": settings,
    }


def _granted(facts: Mapping[str, Any]) -> int:
    """Logical processors, or the control group's quota when that is less."""
    quota = facts["cpu_quota"]
    return int(facts["logical_cpus"]) if quota is None else max(1, min(int(facts["logical_cpus"]), int(quota)))


def _message(words: Sequence[str], count: int) -> Messages:
    return [{"role": "user", "content": " ".join(itertools.islice(itertools.cycle(words), count))}]


@contextlib.contextmanager
def _broken_off(server: serve.Server, limit_s: float) -> Iterator[threading.Event]:
    """Kill the server when the block is not done in time; whether that happened."""
    happened = threading.Event()

    def kill() -> None:
        happened.set()
        server.kill()

    timer = threading.Timer(limit_s, kill)
    timer.daemon = True
    timer.start()
    try:
        yield happened
    finally:
        timer.cancel()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder of the records, and be the only one who tunes. Raises DeviceError, BusyError."""
    try:
        new = [path for path in (folder, folder.parent) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            path.chmod(0o755)  # the service, which reads it, is another user
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, os.strerror(13), str(folder))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DeviceError(
            f"{error.filename}: {error.strerror}", hint="run as root, or give a folder of yours: --home DIR"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BusyError(f"{folder}: another process is tuning", hint="wait for it, then try again") from None
    finally:
        os.close(handle)


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [f"{record['bundle_name']}, {record['started_utc']}, {record['seconds']:.0f} s"]
    for trial in record["candidates"]:
        shown = Candidate(trial["candidate"]["threads"], tuple(trial["candidate"]["arguments"]))
        ratio = f"{trial['ratios'][-1]:.2f} ×" if trial["ratios"] else ""
        lines.append(f"  {ratio:>7}  {shown!s:<72}  {trial['dropped'] or 'kept'}")
    if record["not_tried"]:
        lines.append(f"  not tried for want of time: {len(record['not_tried'])} (--minutes)")
    settings = record["tuned"]
    if settings is None:
        lines.append(f"the presets stay: {record['presets_stay_because']}")
        return "\n".join(lines)
    low, high = settings["interval"]
    chosen = tuned.Tuned(settings["threads"], tuple(settings["arguments"]), settings["gain"])
    lines.append(
        f"from the next start on: {chosen}: {settings['gain']:.2f} × as fast "
        f"({settings['confidence']:.0%} interval {low:.2f} to {high:.2f}, {len(record['pairs'])} pairs)"
    )
    return "\n".join(lines)
