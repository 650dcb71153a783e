"""Answers → rows that are fit to learn from, in the student's tokens. Writes train.jsonl and held_out.jsonl.

Where teacher and student share their tokens, an answer keeps those that the teacher chose; else question and answer are
rendered with the student's tokenizer and chat template. What is left out is counted by set and reason.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.data.answers import SETS, Answered, Candidate, read_answers
from toolchain.data.formats import folded
from toolchain.data.rows import Finish, Row, write_rows
from toolchain.errors import ArtifactError, DataError, ModelError
from toolchain.recipe import Data, Select
from toolchain.reporter import Reporter, bar
from toolchain.student import load
from toolchain.teacher import embedding
from toolchain.teacher.generate import render, render_text

REASONS = (
    "too_long",  # question and answer have more than data.max_length tokens
    "truncated",  # the answer was cut off
    "empty",
    "holds_eos",  # the answer's text has a token that ends answers
    "merges_with_question",  # the first letters of the answer and the end of the prompt are one token
    "answer_too_short",
    "answer_too_long",
    "duplicate",
)


class _UnfitError(Exception):
    """Why a candidate cannot be a row: one of REASONS, and what to tell when that is an error."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class _Fit:
    """A candidate that can be a row."""

    row: Row
    teacher_tokens: bool
    """Whether the tokens are the teacher's own."""


@dataclass(frozen=True)
class _Chosen:
    answered: Answered
    fit: _Fit
    similarity: float | None
    """Cosine to the data set's answer, else the mean of those to the other candidates."""


def run(
    settings: Select,
    data: Data,
    *,
    max_new_tokens: int,
    answers: Path,
    student: Path,
    vocabulary: Path,
    embedding_model: Path | None,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Choose and render. `student`: a folder with its tokenizer; `vocabulary`: the verdict's file; rows keep the order.

    Raises DataError (a row that does not fit and may not be dropped; no rows left), ModelError, ArtifactError.
    """
    asked = read_answers(answers)
    maker = _Maker(settings, data, student, common=_common_ids(vocabulary))
    dropped: Counter[str] = Counter({f"{name}_{reason}": 0 for name in SETS for reason in REASONS})
    fits: list[tuple[Answered, list[_Fit]]] = []
    with bar(report, "rows", total=len(asked), unit="question") as task:
        for answered in asked:
            try:
                fits.append((answered, maker.fits(answered)))
            except _UnfitError as unfit:
                dropped[f"{answered.set}_{unfit.reason}"] += 1
            task.advance(1)
    chosen = _choose(fits, embedding_model, report)
    if settings.duplicates == "drop":
        before = len(chosen)
        chosen = _without_repeats(chosen)
        dropped["train_duplicate"] = before - len(chosen)
    rows = {name: [each.fit.row for each in chosen if each.answered.set == name] for name in SETS}
    for name in SETS:
        if not rows[name]:
            left = {key: count for key, count in dropped.items() if key.startswith(name) and count}
            total = sum(answered.set == name for answered in asked)
            raise DataError(
                f"{name}: none of {total} rows is left: {json.dumps(left)}",
                hint=f"raise data.max_length ({data.max_length}) or generate.max_new_tokens ({max_new_tokens}), "
                "widen [select], or look at the answers",
            )
        write_rows(out / f"{name}.jsonl", rows[name])
    sizes = {name: len(rows[name]) for name in SETS}
    every = [row for name in SETS for row in rows[name]]
    return {
        "summary": f"{sizes['train']} rows to train on, {sizes['held_out']} held out, {dropped.total()} left out",
        "rows": sizes,
        "dropped": dict(dropped),
        "candidates": sum(len(answered.candidates) for answered in asked),
        "fit_candidates": sum(len(found) for _, found in fits),
        "rows_in_teacher_tokens": sum(each.fit.teacher_tokens for each in chosen),
        "similarity": {name: _distribution([each for each in chosen if each.answered.set == name]) for name in SETS},
        "prompt_tokens": sum(len(row.prompt_ids) for row in every),
        "answer_tokens": sum(len(row.answer_ids) for row in every),
    }


def _common_ids(vocabulary: Path) -> int:
    """How many ids, from 0, mean the same to teacher and student; 0 where they do not, or that is not known."""
    try:
        found = json.loads(vocabulary.read_text(encoding="utf-8"))
        return int(found["ids"]) if found["verdict"] in ("same", "padded") else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{vocabulary}: no verdict: {error}", hint="run the `vocabulary` stage again") from error


class _Maker:
    """Candidates → rows of the student."""

    def __init__(self, settings: Select, data: Data, student: Path, *, common: int) -> None:
        self._settings = settings
        self._data = data
        self._tokenizer = load.load_tokenizer(student)
        self._stops = load.stop_ids(student, self._tokenizer)
        self._common = common

    def fits(self, answered: Answered) -> list[_Fit]:
        """What can be a row, one at least. Raises _UnfitError with the first candidate's reason, or DataError."""
        where = f"{answered.set}: {answered.id}"
        prompt = render(self._tokenizer, answered.messages, where=where)
        found: list[_Fit] = []
        first: _UnfitError | None = None
        for candidate in answered.candidates:
            try:
                found.append(self._fit(answered, candidate, prompt, where))
            except _UnfitError as unfit:
                first = first or unfit
        if found:
            return found
        first = first or _UnfitError("empty")
        if first.reason == "too_long" and self._data.too_long == "error":
            raise DataError(
                f"{where}: {first.detail} tokens; data.max_length is {self._data.max_length}",
                hint="raise data.max_length, shorten the row, or set data.too_long = 'drop'",
            )
        raise first

    def _fit(self, answered: Answered, candidate: Candidate, prompt: tuple[int, ...], where: str) -> _Fit:
        if len(prompt) >= self._data.max_length:
            raise _UnfitError("too_long", f"the question alone has {len(prompt)}")
        if candidate.finish == "length" and self._settings.truncated == "drop":
            raise _UnfitError("truncated")
        text = candidate.text.strip()
        if not text:
            raise _UnfitError("empty")
        given = self._teacher_tokens(answered, candidate, prompt)
        ids = given or self._render(answered, text, candidate.finish, prompt, where)
        size = len(prompt) + len(ids)
        if size > self._data.max_length:
            raise _UnfitError("too_long", f"question and answer have {size}")
        length = len(ids) - (candidate.finish == "stop")
        if length < 1:
            raise _UnfitError("empty")
        if length < self._settings.min_answer_tokens:
            raise _UnfitError("answer_too_short")
        if self._settings.max_answer_tokens is not None and length > self._settings.max_answer_tokens:
            raise _UnfitError("answer_too_long")
        row = Row(answered.id, answered.messages, text, prompt, ids, candidate.finish)
        return _Fit(row, given is not None)

    def _teacher_tokens(
        self, answered: Answered, candidate: Candidate, prompt: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """The teacher's own tokens, where the student reads the question alike, has them all and stops at the last."""
        ids = candidate.ids
        if not ids or answered.prompt_ids != prompt or max(ids) >= self._common:
            return None
        ends = [at for at, token in enumerate(ids) if token in self._stops]
        return ids if ends == ([len(ids) - 1] if candidate.finish == "stop" else []) else None

    def _render(
        self, answered: Answered, text: str, finish: Finish, prompt: tuple[int, ...], where: str
    ) -> tuple[int, ...]:
        """The answer as the student's template writes it, with the eos that ends it; without it when it was cut off."""
        whole = render(self._tokenizer, answered.messages, where=where, answer=text)
        if whole[: len(prompt)] != prompt:
            before = render_text(self._tokenizer, answered.messages, where=where)
            if render_text(self._tokenizer, answered.messages, where=where, answer=text).startswith(before):
                raise _UnfitError("merges_with_question")
            raise ModelError(
                f"{where}: with its answer the conversation no longer starts with the prompt",
                hint="the student's chat template writes an answered question in another way than an open one: "
                "change its chat_template.jinja, or choose a student with the teacher's tokenizer and template",
            )
        tail = whole[len(prompt) :]
        ends = [at for at, token in enumerate(tail) if token in self._stops]
        if not ends:
            raise ModelError(
                f"{where}: the chat template ends the answer without an eos token (ids {list(self._stops)})",
                hint="set eos_token to what ends a turn in the template, else the student never learns to stop",
            )
        if len(ends) > 1:
            raise _UnfitError("holds_eos")
        return tail[: ends[0] + 1] if finish == "stop" else tail[: ends[0]]


def _choose(
    fits: Sequence[tuple[Answered, list[_Fit]]], embedding_model: Path | None, report: Reporter
) -> list[_Chosen]:
    """One candidate per question: the one most alike; the first where there is no model to tell by."""
    if embedding_model is None:
        return [_Chosen(answered, found[0], None) for answered, found in fits]
    texts = [fit.row.answer for _, found in fits for fit in found]
    texts += [answered.reference for answered, _ in fits if answered.reference is not None]
    unique = {text: at for at, text in enumerate(dict.fromkeys(texts))}
    vectors = embedding.embed(embedding_model, list(unique), report=report)
    chosen = []
    for answered, found in fits:
        own = vectors[[unique[fit.row.answer] for fit in found]]
        if answered.reference is not None:
            scores = own @ vectors[unique[answered.reference]]
        elif len(found) > 1:
            scores = ((own @ own.T).sum(-1) - 1) / (len(found) - 1)
        else:
            chosen.append(_Chosen(answered, found[0], None))
            continue
        best = int(scores.argmax())
        chosen.append(_Chosen(answered, found[best], float(scores[best])))
    return chosen


def _without_repeats(chosen: Sequence[_Chosen]) -> list[_Chosen]:
    """Training rows whose conversation or answer came before are left out; held-out rows stay."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for each in chosen:
        if each.answered.set == "train":
            keys = {
                ("question", *(folded(turn.content) for turn in each.fit.row.messages)),
                ("answer", folded(each.fit.row.answer)),
            }
            if seen & keys:
                continue
            seen |= keys
        kept.append(each)
    return kept


def _distribution(chosen: Sequence[_Chosen]) -> dict[str, Any] | None:
    """Figures of the similarities, for the manifest; None where there are none."""
    found = [each.similarity for each in chosen if each.similarity is not None]
    if not found:
        return None
    low, middle, high = (float(value) for value in np.quantile(found, (0.1, 0.5, 0.9)))
    to_reference = sum(each.similarity is not None and each.answered.reference is not None for each in chosen)
    return {
        "rows": len(found),
        "to_the_data_sets_answer": to_reference,
        "mean": float(np.mean(found)),
        "least": min(found),
        "p10": low,
        "median": middle,
        "p90": high,
    }
