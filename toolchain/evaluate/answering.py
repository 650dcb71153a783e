"""What a checkpoint answers to questions, how likely it finds other answers, and how long it takes.

Everything that a model was asked is journalled in `resume/`: what is computed once is not computed again after a kill.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain.data.rows import Finish, Message, Row
from toolchain.errors import ModelError
from toolchain.journal import Journal
from toolchain.recipe import Generate
from toolchain.reporter import Reporter, bar
from toolchain.student import load, precision
from toolchain.teacher import decode, generate
from toolchain.teacher.journal import Prompt

DIGITS = 6
"""Decimals of a score that is kept."""
_BATCH_TOKENS = 2048
_Model = Callable[[], Any]
"""Loads the model at the first call."""


@dataclass(frozen=True)
class Answer:
    """Tokens with the eos that ended them, if one did, and their text."""

    ids: tuple[int, ...]
    finish: Finish
    text: str

    @property
    def tokens(self) -> int:
        """Length without eos."""
        return len(self.ids) - (self.finish == "stop")


@dataclass(frozen=True)
class Question:
    """A prompt as the chat template renders it, and the answer that others are measured against."""

    id: str
    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    limit: int
    """Most answer tokens."""
    reference: Answer


@dataclass(frozen=True)
class Asked:
    """What one model gave."""

    answers: Mapping[str, list[Answer]]
    """By set, in the order of its questions."""
    likelihoods: list[float]
    timing: dict[str, Any]


def ask(
    name: str,
    folder: Path,
    sets: Mapping[str, Sequence[Question]],
    *,
    score: Sequence[Question],
    time_alone: Sequence[Question],
    decoding: Generate,
    batch_size: int,
    journal: Journal,
    report: Reporter,
) -> Asked:
    """Answer all `sets`, score the references of `score`, and answer `time_alone` one at a time. Raises ModelError.

    Weights are loaded if something is missing in the journal. `decoding` is greedy.
    """
    device = precision.pick_device()
    tokenizer = load.load_tokenizer(folder)
    stops = load.stop_ids(folder, tokenizer)
    gc.collect()  # a model before this one may lie in a cycle of references, and would count into the peak of memory

    def loader(dtype: torch.dtype) -> _Model:
        return cache(lambda: load.load_model(folder, dtype=dtype, device=device)[0])

    model = loader(precision.decoding_type(device))
    answers: dict[str, list[Answer]] = {}
    batches: list[dict[str, Any]] = []
    with bar(report, f"{name}: answers", total=sum(map(len, sets.values())), unit="question") as task:
        for part, questions in sets.items():
            found: dict[int, Answer] = {}
            for batch in _batches(questions, batch_size):
                work = partial(_decode_measured, model, [questions[at] for at in batch], stops, decoding)
                done = journal.once(f"{name}/{part}/{batch[0]}", work)
                for at, (finish, *ids) in zip(batch, done["answers"], strict=True):
                    found[at] = Answer(tuple(ids), finish, decode.text_of(tokenizer, ids).strip())
                batches.append(done)
                task.advance(len(batch))
            answers[part] = [found[at] for at in range(len(questions))]
    timing = time_answers(name, model, time_alone, stops, decoding, journal=journal, report=report)
    peaks = [one["peak_bytes"] for one in batches if one["peak_bytes"] is not None]
    timing["batched_tokens_per_second"] = sum(one["tokens"] for one in batches) / sum(one["seconds"] for one in batches)
    timing["peak_memory_bytes"] = max(peaks) if peaks else None
    if precision.weights_type(device) != precision.decoding_type(device):
        del model, work
        model = loader(precision.weights_type(device))
    return Asked(answers, _likelihoods(name, model, score, batch_size, journal=journal, report=report), timing)


def _batches(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Questions of like length together, by index: the same in every run, since the batch decides the rounding."""
    order = sorted(range(len(questions)), key=lambda at: (len(questions[at].ids), at))
    return [order[at : at + size] for at in range(0, len(order), size)]


def _decode(model: Any, batch: Sequence[Question], stops: Sequence[int], decoding: Generate) -> list[list[Any]]:
    """[finish, *ids] for each question, by the decoding of `generate`."""
    prompts = [Prompt(at, one.id, one.messages, one.ids, one.limit, seed=0) for at, one in enumerate(batch)]
    found = decode.decode(model, prompts, stops=stops, choose=decode.Sampling(decoding))
    return [[finish, *ids] for ids, finish in found]


def _decode_measured(
    model: _Model, batch: Sequence[Question], stops: Sequence[int], decoding: Generate
) -> dict[str, Any]:
    loaded = model()
    on_gpu = loaded.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    answers = _decode(loaded, batch, stops, decoding)
    return {
        "seconds": time.perf_counter() - started,
        "tokens": sum(len(ids) for _, *ids in answers),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "answers": answers,
    }


def time_answers(
    name: str,
    model: _Model,
    questions: Sequence[Question],
    stops: Sequence[int],
    decoding: Generate,
    *,
    journal: Journal,
    report: Reporter,
) -> dict[str, Any]:
    """Seconds per whole answer at batch 1, after two tokens that are not counted."""

    def work() -> list[tuple[float, int]]:
        loaded = model()
        _decode(loaded, [replace(questions[0], limit=2)], stops, decoding)
        found = []
        with bar(report, f"{name}: one at a time", total=len(questions), unit="question") as task:
            for question in questions:
                started = time.perf_counter()
                ((_, *ids),) = _decode(loaded, [question], stops, decoding)
                found.append((time.perf_counter() - started, len(ids)))
                task.advance()
        return found

    seconds, tokens = zip(*journal.once(f"{name}/alone", work), strict=True)
    return {
        "answer_seconds": {"median": statistics.median(seconds), "samples": list(seconds)},
        "answer_tokens": list(tokens),
        "tokens_per_second": sum(tokens) / sum(seconds),
    }


def time_checkpoint(
    name: str,
    folder: Path,
    questions: Sequence[Question],
    decoding: Generate,
    *,
    journal: Journal,
    report: Reporter,
) -> dict[str, Any]:
    """`time_answers` of a checkpoint with its own tokens: the prompts are rendered anew."""
    tokenizer = load.load_tokenizer(folder)
    own = [
        Question(one.id, one.messages, generate.render(tokenizer, one.messages, where=one.id), one.limit, one.reference)
        for one in questions
    ]
    device = precision.pick_device()
    model = cache(lambda: load.load_model(folder, dtype=precision.decoding_type(device), device=device)[0])
    stops = load.stop_ids(folder, tokenizer)
    return time_answers(name, model, own, stops, decoding, journal=journal, report=report)


def _likelihoods(
    name: str, model: _Model, questions: Sequence[Question], batch_size: int, *, journal: Journal, report: Reporter
) -> list[float]:
    """Mean log-likelihood per token, in nats, of each question's reference (teacher forcing)."""

    def work(part: Sequence[Question]) -> list[float]:
        rows = [Row(one.id, one.messages, "", one.ids, one.reference.ids, one.reference.finish) for one in part]
        scores = load.answer_logprobs(model(), rows, batch_tokens=_BATCH_TOKENS)
        return [
            round(float(logprobs[np.arange(len(row.answer_ids)), list(row.answer_ids)].mean(dtype=np.float64)), DIGITS)
            for row, logprobs in zip(rows, scores, strict=True)
        ]

    found: list[float] = []
    with bar(report, f"{name}: likelihood of other answers", total=len(questions), unit="question") as task:
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            found += journal.once(f"{name}/likelihood/{start}", partial(work, part))
            task.advance(len(part))
    if not all(map(math.isfinite, found)):
        raise ModelError(f"{name}: a log-likelihood is not finite", hint="its weights are damaged or overflow 16 bits")
    return found
