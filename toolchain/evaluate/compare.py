"""Before and after on questions: the student's base and the merged student answer what the teacher answered.

Reads the held-out rows, which hold the teacher's answers, and questions from elsewhere where the recipe names a file.
Writes compare.json (every score of every question; equal bytes over runs), timing.json, compare.md and answers.jsonl.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.data.formats import read_examples
from toolchain.data.rows import Row, read_rows
from toolchain.errors import DataError
from toolchain.evaluate import answer_scores, compare_text
from toolchain.evaluate.answering import DIGITS, Answer, Asked, Question, ask, time_checkpoint
from toolchain.evaluate.bootstrap import CONFIDENCE, paired_differences
from toolchain.journal import Journal
from toolchain.recipe import Compare, Data, Generate
from toolchain.reporter import Reporter
from toolchain.student import checkpoint_files, load, precision
from toolchain.teacher import generate
from toolchain.teacher.embedding import embed

SCHEMA_VERSION = 1
TEACHER, BEFORE, AFTER = "teacher", "student before", "student after"
HELD_OUT, OUT_OF_DOMAIN = "held_out", "out_of_domain"
_TIMED = 3
"""Questions that each model answers one at a time, for the latency."""

Scores = dict[str, list[float]]
"""By name of the score: one value for each question."""
Similarity = Callable[[Sequence[str], Sequence[str]], list[float]]


def run(
    settings: Compare,
    data: Data,
    decoding: Generate,
    *,
    seed: int,
    held_out: Path,
    teacher: Path | None,
    student: Path,
    merged: Path,
    embedding_model: Path | None,
    out_of_domain: Path | None,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """`teacher`, `student` and `merged` are checkpoint folders; the teacher is asked for its latency alone.

    Answers are greedy, with the repetition penalty that the teacher had. Raises DataError, ModelError.
    """
    limit = settings.max_new_tokens or decoding.max_new_tokens
    decoding = decoding.model_copy(update={"sampling_temperature": 0.0, "candidates": 1})
    found = {HELD_OUT: _held_out(held_out, data, limit)}
    if out_of_domain is not None:
        found[OUT_OF_DOMAIN] = _out_of_domain(out_of_domain, student, data, limit)
    sets = {name: _draw(questions, settings.questions, seed) for name, questions in found.items()}
    with Journal(out / "resume" / "compare.jsonl") as journal:
        timed = sets[HELD_OUT][:_TIMED]
        asked = {
            name: ask(
                name,
                folder,
                sets,
                score=sets.get(OUT_OF_DOMAIN, ()),
                time_alone=timed,
                decoding=decoding,
                batch_size=settings.batch_size,
                journal=journal,
                report=report,
            )
            for name, folder in ((BEFORE, student), (AFTER, merged))
        }
        timing = {name: result.timing for name, result in asked.items()}
        if teacher is not None:
            timing[TEACHER] = time_checkpoint(TEACHER, teacher, timed, decoding, journal=journal, report=report)
    similarity = None if embedding_model is None else _similarity(embedding_model, report)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "conditions": _conditions(settings, decoding, limit, seed, {name: len(all_) for name, all_ in found.items()}),
        "models": {
            name: _size(folder)
            for name, folder in ((TEACHER, teacher), (BEFORE, student), (AFTER, merged))
            if folder is not None
        },
        "sets": {
            name: _figures(name, questions, asked, similarity, resamples=settings.resamples, seed=seed)
            for name, questions in sets.items()
        },
        "not_measured": _not_measured(teacher, embedding_model, out_of_domain),
    }
    _write_json(out / "compare.json", result)
    _write_json(out / "timing.json", timing)
    _write_answers(out / "answers.jsonl", sets, asked)
    (out / "compare.md").write_text(compare_text.render(result, timing), encoding="utf-8")
    return {
        "summary": compare_text.summary(result),
        "differences": {
            name: {score: entry["difference"] for score, entry in figures["scores"].items()}
            for name, figures in result["sets"].items()
        },
        "timing": timing,
    }


def _conditions(
    settings: Compare, decoding: Generate, limit: int, seed: int, available: Mapping[str, int]
) -> dict[str, Any]:
    device = precision.pick_device()
    return {
        "questions_available": available,
        "decoding": "greedy",
        "repetition_penalty": decoding.repetition_penalty,
        "max_new_tokens": limit,
        "batch_size": settings.batch_size,
        "device": device.type,
        "decoding_precision": str(precision.decoding_type(device)).removeprefix("torch."),
        "likelihood_precision": str(precision.weights_type(device)).removeprefix("torch."),
        "length_window_tokens": answer_scores.LENGTH_WINDOW,
        "interval": {
            "method": "paired percentile bootstrap over questions",
            "confidence": CONFIDENCE,
            "resamples": settings.resamples,
            "seed": seed,
        },
    }


def _not_measured(teacher: Path | None, embedding_model: Path | None, out_of_domain: Path | None) -> dict[str, str]:
    reasons = {}
    if out_of_domain is None:
        reasons["out of domain"] = "not checked: compare.out_of_domain names no file, so forgetting would not show"
    if embedding_model is None:
        reasons["similarity"] = "compare.embedding_model is not set"
    if teacher is None:
        reasons["latency of the teacher"] = "no checkpoint of it is run here in 16 bits"
    if precision.pick_device().type != "cuda":
        reasons["peak memory"] = "one process holds the models in turn: only a GPU's allocator tells them apart"
    return reasons


def _size(folder: Path) -> dict[str, int]:
    """Parameters, tied ones once, and bytes of the files that hold them."""
    tensors = checkpoint_files.tensors_of(folder).values()
    return {
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "weight_bytes": sum(file.stat().st_size for file in {tensor.file for tensor in tensors}),
    }


# --- Questions.


def _held_out(path: Path, data: Data, limit: int) -> list[Question]:
    def room(row: Row) -> int:
        return max(1, min(limit, data.max_length - len(row.prompt_ids)))

    return [
        Question(row.id, row.messages, row.prompt_ids, room(row), Answer(row.answer_ids, row.finish, row.answer))
        for row in read_rows(path)
    ]


def _out_of_domain(path: Path, student: Path, data: Data, limit: int) -> list[Question]:
    """Questions as they stand in the file, without data.system; a reference is cut where data.max_length ends."""
    tokenizer = load.load_tokenizer(student)
    found = []
    for example in read_examples(path, format="auto", need_answer=True, system=None):
        assert example.answer is not None
        ids = generate.render(tokenizer, example.messages, where=example.where)
        room = data.max_length - len(ids)
        if room < 1:
            raise DataError(
                f"{example.where}: the question alone has {len(ids)} tokens; data.max_length is {data.max_length}",
                hint="raise data.max_length, or take the row out of the file of compare.out_of_domain",
            )
        # By itself, not through the template, which may write more than the answer; no end of turn: it says nothing
        # about what the student still knows.
        reference = tuple(tokenizer(example.answer, add_special_tokens=False)["input_ids"])[:room]
        answer = Answer(reference, "length", example.answer)
        found.append(Question(example.id, example.messages, ids, min(limit, room), answer))
    return found


def _draw(questions: Sequence[Question], most: int | None, seed: int) -> list[Question]:
    """At most `most`, by the hash of their ids, in their order: the first ones of a file are often of one kind."""

    def rank(question: Question) -> str:
        return hashlib.sha256(f"{seed}/{question.id}".encode()).hexdigest()

    drawn = {question.id for question in sorted(questions, key=rank)[:most]}
    return [question for question in questions if question.id in drawn]


# --- Scores.


def _figures(
    part: str,
    questions: Sequence[Question],
    asked: Mapping[str, Asked],
    similarity: Similarity | None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Every score of a set: means, samples by question, and after − before with its interval."""
    before, after = (_scores(part, questions, asked[name], similarity) for name in (BEFORE, AFTER))
    teacher = _own_scores([question.reference for question in questions]) if part == HELD_OUT else {}
    differences = paired_differences(list(before.values()), list(after.values()), resamples=resamples, seed=seed)
    return {
        "questions": [question.id for question in questions],
        "scores": {
            name: {
                **({TEACHER: _samples(teacher[name])} if name in teacher else {}),
                "before": _samples(before[name]),
                "after": _samples(after[name]),
                "difference": {
                    "mean": round(difference.mean, DIGITS),
                    "low": round(difference.low, DIGITS),
                    "high": round(difference.high, DIGITS),
                    "excludes_zero": difference.excludes_zero,
                },
            }
            for name, difference in zip(before, differences, strict=True)
        },
    }


def _samples(values: list[float]) -> dict[str, Any]:
    return {"mean": round(statistics.fmean(values), DIGITS), "samples": values}


def _scores(part: str, questions: Sequence[Question], asked: Asked, similarity: Similarity | None) -> Scores:
    answers, references = asked.answers[part], [question.reference for question in questions]
    pairs = list(zip(answers, references, strict=True))
    scores: Scores = {} if part == HELD_OUT else {"log_likelihood": asked.likelihoods}
    scores["token_f1"] = [round(answer_scores.token_f1(one.text, other.text), DIGITS) for one, other in pairs]
    scores["exact_match"] = [answer_scores.exact_match(one.text, other.text) for one, other in pairs]
    if similarity is not None:
        cosines = similarity([one.text for one, _ in pairs], [other.text for _, other in pairs])
        scores["similarity"] = [round(cosine, DIGITS) for cosine in cosines]
    if part == HELD_OUT:
        scores["length_within"] = [answer_scores.length_within(one.tokens, other.tokens) for one, other in pairs]
    return scores | _own_scores(answers)


def _own_scores(answers: Sequence[Answer]) -> Scores:
    """What an answer shows by itself."""
    return {
        "stopped": [float(answer.finish == "stop") for answer in answers],
        "empty": [float(not answer.text) for answer in answers],
        "answer_tokens": [float(answer.tokens) for answer in answers],
    }


def _similarity(folder: Path, report: Reporter) -> Similarity:
    """Cosine of the sentence embeddings of each pair, in [-1, 1]."""

    def score(answers: Sequence[str], references: Sequence[str]) -> list[float]:
        vectors = embed(folder, [*answers, *references], report=report)
        one, other = vectors[: len(answers)], vectors[len(answers) :]
        return [float(cosine) for cosine in (one * other).sum(axis=1)]

    return score


# --- Files.


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_answers(path: Path, sets: Mapping[str, Sequence[Question]], asked: Mapping[str, Asked]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for part, questions in sets.items():
            for at, question in enumerate(questions):
                line = {
                    "set": part,
                    "id": question.id,
                    "question": question.messages[-1].content,
                    TEACHER if part == HELD_OUT else "reference": question.reference.text,
                    **{name: result.answers[part][at].text for name, result in asked.items()},
                }
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
