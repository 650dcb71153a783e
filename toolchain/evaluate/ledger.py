"""The ledger: what was gained and lost, row by row from teacher to device, on the same held-out answers.

Reads the held-out rows and every form of the model; writes ledger.json. All figures are over the answer tokens of the
held-out rows (teacher forcing), at temperature 1, in nats. Where a row has the same tokens for teacher and student,
each form is compared with the teacher (KL). Where it has not, or the teacher is an endpoint, KL to the teacher is
undefined: then the forms are judged by the cross-entropy of the held-out answers in the student's own tokens.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from toolchain.data.rows import Row, read_rows
from toolchain.disk import require_free
from toolchain.errors import ModelError
from toolchain.evaluate.bootstrap import CONFIDENCE, RESAMPLES, paired_interval
from toolchain.evaluate.divergence import Logprobs, kl
from toolchain.evaluate.gates import JUDGED_BY
from toolchain.gguf import score as gguf_score
from toolchain.gguf.header import read_facts
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.reporter import Reporter, bar
from toolchain.student.vocabulary import read as read_vocabulary

SCHEMA_VERSION = 2
TEACHER = "teacher"


@dataclass(frozen=True)
class LedgerRow:
    """One form of the model. What is about the teacher is None where KL to it is undefined."""

    name: str
    parameters: int
    adapter_parameters: int
    bytes: int
    """Weights as stored, in bytes: the adapter's row counts base and adapter."""
    cross_entropy: float
    """Mean negative log-likelihood of the answer tokens."""
    perplexity: float
    """exp of it."""
    kl_to_teacher: float | None
    """Mean KL(teacher ‖ this)."""
    top1_agreement: float | None
    """Share of positions where the likeliest token is the teacher's."""
    previous: str | None
    """The form this one was made from, where that step should lose nothing or little."""
    kl_to_previous: float | None
    """Mean KL(previous ‖ this)."""
    top1_agreement_with_previous: float | None
    cross_entropy_by_row: tuple[float, ...]
    """Mean over each held-out row, in order: the samples behind `cross_entropy`."""
    kl_to_teacher_by_row: tuple[float, ...] | None
    """The samples behind `kl_to_teacher`."""
    tokens_by_row: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Form:
    """One form of the model and how to get its log-probabilities, row by row."""

    name: str
    previous: str | None
    parameters: int
    adapter_parameters: int
    bytes: int
    scores: Callable[[], Iterator[Logprobs]]


@dataclass
class Sums:
    """What is added up over the answer positions of one comparison."""

    kl: float = 0.0
    agree: int = 0
    tokens: int = 0

    def add(self, reference: Logprobs, logprobs: Logprobs) -> float:
        """Add one row; its mean KL(reference ‖ logprobs) comes back."""
        by_position = kl(reference, logprobs)
        self.kl += float(by_position.sum())
        self.agree += int((reference.argmax(axis=1) == logprobs.argmax(axis=1)).sum())
        self.tokens += len(by_position)
        return float(by_position.mean())


class Scratch:
    """Log-probabilities of one form on disk, [answer tokens of all rows, vocabulary] float32, for later comparisons."""

    def __init__(self, path: Path, tokens: int, vocabulary: int) -> None:
        self.path = path
        self.values: npt.NDArray[np.float32] = np.memmap(path, np.float32, "w+", shape=(tokens, vocabulary))

    def close(self) -> None:
        del self.values
        self.path.unlink()


@dataclass(frozen=True)
class Gain:
    """What distillation did to one figure, before − after: above 0 is better."""

    judged_by: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    """Ends of the percentile interval at `confidence`; None with a single held-out row."""
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES


def run(
    *,
    batch_tokens: int,
    load_teacher_in_4bit: bool,
    inputs: Mapping[str, Path],
    llama: LlamaCpp,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Score every form on the held-out rows and write out/ledger.json. Raises HostError, ModelError.

    "student after" is what `merge` folded: the last adapter on the 16-bit base, or on the base as its 4 bits stand for
    it where that was the better one. `load_teacher_in_4bit`: the teacher is scored as it was captured.
    """
    rows = read_rows(inputs["held_out"])
    compared = read_vocabulary(inputs["vocabulary"])
    has_teacher = compared.same_rows and "teacher" in inputs
    ids = compared.ids if has_teacher else compared.student.rows
    _check_ids(rows, ids)
    forms = _forms(inputs, rows, llama, batch_tokens)
    if has_teacher:
        forms.insert(0, _teacher(inputs, rows, llama, batch_tokens, load_teacher_in_4bit))
    scratch_folder = out / "scratch"
    scratch_folder.mkdir()
    ledger_rows = score_forms(forms, rows, ids, scratch_folder, report)
    scratch_folder.rmdir()
    named = {row.name: row for row in ledger_rows}
    gain = gain_of(named["student before"], named["student after"])
    ledger = {
        "schema_version": SCHEMA_VERSION,
        "held_out_rows": len(rows),
        "answer_tokens": sum(len(row.answer_ids) for row in rows),
        "vocabulary": ids,
        "tokenizers": {"verdict": compared.verdict, "reasons": compared.reasons, "prompts": compared.prompts},
        # Times differ from run to run; the ledger is to be the same bytes.
        "rows": [{key: value for key, value in asdict(row).items() if key != "seconds"} for row in ledger_rows],
        "gain": asdict(gain),
        "quantization": json.loads(inputs["quantize_facts"].read_text(encoding="utf-8")),
    }
    (out / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
    last = ledger_rows[-1]
    return {
        "seconds_by_form": {row.name: round(row.seconds, 1) for row in ledger_rows},
        "summary": f"{JUDGED_BY[gain.judged_by]}: {gain.before:.3f} before, {gain.after:.3f} after, "
        f"{getattr(last, gain.judged_by):.3f} as {last.name.removeprefix('GGUF ')}",
    }


def gain_of(before: LedgerRow, after: LedgerRow) -> Gain:
    """The gain in KL to the teacher, or in cross-entropy where there is none, with its paired bootstrap interval."""
    judged_by = "cross_entropy" if after.kl_to_teacher is None else "kl_to_teacher"
    first, last = getattr(before, judged_by), getattr(after, judged_by)
    by_row = [np.array(getattr(row, f"{judged_by}_by_row")) for row in (before, after)]
    low, high = paired_interval(by_row[0] - by_row[1], np.array(after.tokens_by_row)) or (None, None)
    return Gain(judged_by, first, last, first - last, low, high)


def score_forms(
    forms: Sequence[Form], rows: Sequence[Row], vocabulary: int, scratch_folder: Path, report: Reporter
) -> list[LedgerRow]:
    """One ledger row per form, in order. The teacher comes first if it can be compared. A form's scores are kept only
    while others need them."""
    tokens = sum(len(row.answer_ids) for row in rows)
    has_teacher = forms[0].name == TEACHER
    require_free(scratch_folder, (2 + has_teacher) * tokens * vocabulary * 4, "evaluate, for the time of its run,")
    kept: dict[str, Scratch] = {}
    result: list[LedgerRow] = []
    for number, form in enumerate(forms):
        started = time.monotonic()
        own = (
            Scratch(scratch_folder / f"{number}.f32", tokens, vocabulary) if _needed(form.name, forms, number) else None
        )
        to_teacher, to_previous, at = Sums(), Sums(), 0
        nll_by_row: list[float] = []
        kl_by_row: list[float] = []
        with bar(report, f"evaluate: {form.name}", total=len(rows), unit="row") as task:
            for row, scores in zip(rows, form.scores(), strict=True):
                logprobs = _common(scores, vocabulary, form.name, row)
                end = at + len(logprobs)
                if own is not None:
                    own.values[at:end] = logprobs
                nll_by_row.append(
                    -float(logprobs[np.arange(len(logprobs)), list(row.answer_ids)].sum(dtype=np.float64))
                )
                if has_teacher:
                    teacher = logprobs if number == 0 else np.array(kept[TEACHER].values[at:end])
                    kl_by_row.append(to_teacher.add(teacher, logprobs))
                if form.previous is not None:
                    to_previous.add(np.array(kept[form.previous].values[at:end]), logprobs)
                at = end
                task.advance()
        if own is not None:
            kept[form.name] = own
        for name in [name for name in kept if not _needed(name, forms, number)]:
            kept.pop(name).close()
        compared = form.previous is not None
        cross_entropy = sum(nll_by_row) / tokens
        lengths = tuple(len(row.answer_ids) for row in rows)
        result.append(
            LedgerRow(
                name=form.name,
                parameters=form.parameters,
                adapter_parameters=form.adapter_parameters,
                bytes=form.bytes,
                cross_entropy=cross_entropy,
                perplexity=float(np.exp(cross_entropy)),
                kl_to_teacher=to_teacher.kl / tokens if has_teacher else None,
                top1_agreement=to_teacher.agree / tokens if has_teacher else None,
                previous=form.previous,
                kl_to_previous=to_previous.kl / tokens if compared else None,
                top1_agreement_with_previous=to_previous.agree / tokens if compared else None,
                cross_entropy_by_row=tuple(nll / length for nll, length in zip(nll_by_row, lengths, strict=True)),
                kl_to_teacher_by_row=tuple(kl_by_row) if has_teacher else None,
                tokens_by_row=lengths,
                seconds=time.monotonic() - started,
            )
        )
    for scratch in kept.values():
        scratch.close()
    return result


def _needed(name: str, forms: Sequence[Form], done: int) -> bool:
    later = forms[done + 1 :]
    return bool(later) and (name == TEACHER or any(form.previous == name for form in later))


def _check_ids(rows: Sequence[Row], ids: int) -> None:
    """Answers of the student's own added tokens have no score by a padded teacher."""
    for row in rows:
        if max(row.answer_ids) >= ids:
            raise ModelError(
                f"held-out row {row.id} has token {max(row.answer_ids)}, and only ids below {ids} are common",
                hint="the teacher has no such token: leave the question out of data.held_out, or take another student",
            )


def _common(scores: Logprobs, vocabulary: int, form: str, row: Row) -> Logprobs:
    """The scores over the ids that all forms share, as log-probabilities again; padding rows of a head fall away."""
    if scores.shape[0] != len(row.answer_ids) or scores.shape[1] < vocabulary:
        raise ModelError(f"{form}: row {row.id} gave scores of shape {scores.shape}")
    if not np.isfinite(scores[:, :vocabulary]).all():
        raise ModelError(f"{form}: row {row.id} gave a score that is not finite", hint="the weights are damaged")
    if scores.shape[1] == vocabulary:
        return scores
    cut = scores[:, :vocabulary].astype(np.float64)
    return (cut - np.logaddexp.reduce(cut, axis=1, keepdims=True)).astype(np.float32)


def _of_checkpoint(
    path: Path, rows: Sequence[Row], batch_tokens: int, dtype: torch.dtype, *, load_in_4bit: bool = False
) -> Callable[[], Iterator[Logprobs]]:
    from toolchain.student.load import answer_logprobs, load_model
    from toolchain.student.precision import pick_device

    def scores() -> Iterator[Logprobs]:
        model, _ = load_model(path, dtype=dtype, device=pick_device(), load_in_4bit=load_in_4bit)
        yield from answer_logprobs(model, rows, batch_tokens=batch_tokens)

    return scores


def _of_gguf(path: Path, rows: Sequence[Row], llama: LlamaCpp) -> Callable[[], Iterator[Logprobs]]:
    return lambda: gguf_score.answer_logprobs(path, rows, llama=llama)


def _teacher(
    inputs: Mapping[str, Path], rows: Sequence[Row], llama: LlamaCpp, batch_tokens: int, load_in_4bit: bool
) -> Form:
    """The teacher as it answered: by llama.cpp where that runs it, whose checkpoint then holds no weights."""
    from toolchain.student.precision import pick_device, weights_type

    gguf = inputs.get("gguf_teacher")
    if gguf is not None:
        facts = read_facts(gguf)
        return Form(TEACHER, None, facts.parameters, 0, facts.file_bytes, _of_gguf(gguf, rows, llama))
    folder = inputs["teacher"]
    scores = _of_checkpoint(folder, rows, batch_tokens, weights_type(pick_device()), load_in_4bit=load_in_4bit)
    return Form(TEACHER, None, *_checkpoint_size(folder), scores)


def _forms(inputs: Mapping[str, Path], rows: Sequence[Row], llama: LlamaCpp, batch_tokens: int) -> list[Form]:
    from toolchain.student.load import answer_logprobs
    from toolchain.student.merge import load_adapted, onto_four_bits
    from toolchain.student.precision import pick_device

    student, adapter, merged = (inputs[name] for name in ("student", "adapter", "merged"))

    def adapted() -> Iterator[Logprobs]:
        model = load_adapted(student, adapter, four_bits=onto_four_bits(merged))
        yield from answer_logprobs(model.to(pick_device()), rows, batch_tokens=batch_tokens)

    before, after = (_of_checkpoint(path, rows, batch_tokens, torch.float32) for path in (student, merged))
    parameters, size = _weights(student)
    more, adapter_size = _weights(adapter)
    forms = [
        Form("student before", None, parameters, 0, size, before),
        Form("student after", None, parameters, more, size + adapter_size, adapted),
        Form("merged", "student after", *_checkpoint_size(merged), after),
    ]
    for name, path in (("GGUF 16-bit", inputs["gguf_16bit"]), ("", inputs["gguf_quantized"])):
        facts = read_facts(path)
        label = name or f"GGUF {facts.file_type}"
        forms.append(Form(label, forms[-1].name, facts.parameters, 0, facts.file_bytes, _of_gguf(path, rows, llama)))
    return forms


def _checkpoint_size(folder: Path) -> tuple[int, int, int]:
    parameters, size = _weights(folder)
    return parameters, 0, size


def _weights(folder: Path) -> tuple[int, int]:
    """Parameters and bytes of a folder's safetensors, read off their headers."""
    from safetensors import safe_open

    parameters = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        with safe_open(path, "np") as file:
            parameters += sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    return parameters, size
