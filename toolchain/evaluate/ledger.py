"""The ledger: what was gained and lost, row by row from teacher to device, on the same held-out answers.

Reads the held-out rows and every form of the model; writes ledger.json. All figures are over the answer tokens of the
teacher's own answers (teacher forcing), at temperature 1, in nats.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from toolchain.data.rows import Row, read_rows
from toolchain.errors import HostError, ModelError
from toolchain.gguf import score as gguf_score
from toolchain.gguf.header import read_facts
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.reporter import Reporter, bar

SCHEMA_VERSION = 1
Logprobs = npt.NDArray[np.float32]
"""[answer tokens of one row, vocabulary], natural logarithm."""


@dataclass(frozen=True)
class LedgerRow:
    """One form of the model."""

    name: str
    parameters: int
    adapter_parameters: int
    bytes: int
    """Weights as stored, in bytes: the adapter's row counts base and adapter."""
    perplexity: float
    """exp of the mean negative log-likelihood of the teacher's answer tokens."""
    kl_to_teacher: float
    """Mean KL(teacher ‖ this)."""
    top1_agreement: float
    """Share of positions where the likeliest token is the teacher's."""
    previous: str | None
    """The form this one was made from, where that step should lose nothing or little."""
    kl_to_previous: float | None
    """Mean KL(previous ‖ this)."""
    top1_agreement_with_previous: float | None
    kl_to_teacher_by_row: tuple[float, ...]
    """Mean over each held-out row, in order: the samples behind `kl_to_teacher`."""
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
        kl = kl_by_position(reference, logprobs)
        self.kl += float(kl.sum())
        self.agree += int((reference.argmax(axis=1) == logprobs.argmax(axis=1)).sum())
        self.tokens += len(kl)
        return float(kl.mean())


def kl_by_position(reference: Logprobs, logprobs: Logprobs) -> npt.NDArray[np.float64]:
    """KL(reference ‖ logprobs) at each position, in nats; both [positions, vocabulary]. Summed in float64."""
    p, q = torch.from_numpy(reference), torch.from_numpy(logprobs)
    kl: npt.NDArray[np.float64] = (p - q).mul_(p.exp()).sum(-1, dtype=torch.float64).numpy()
    return kl


class Scratch:
    """Log-probabilities of one form on disk, [answer tokens of all rows, vocabulary] float32, for later comparisons."""

    def __init__(self, path: Path, tokens: int, vocabulary: int) -> None:
        self.path = path
        self.values: npt.NDArray[np.float32] = np.memmap(path, np.float32, "w+", shape=(tokens, vocabulary))

    def close(self) -> None:
        del self.values
        self.path.unlink()


def run(
    *, batch_tokens: int, inputs: Mapping[str, Path], llama: LlamaCpp, out: Path, report: Reporter
) -> dict[str, Any]:
    """Score every form on the held-out rows and write out/ledger.json. Raises HostError, ModelError."""
    rows = read_rows(inputs["held_out"])
    forms = _forms(inputs, rows, llama, batch_tokens)
    scratch_folder = out / "scratch"
    scratch_folder.mkdir()
    ledger_rows = score_forms(forms, rows, _vocabulary(inputs), scratch_folder, report)
    scratch_folder.rmdir()
    facts = json.loads(inputs["quantize_facts"].read_text(encoding="utf-8"))
    ledger = {
        "schema_version": SCHEMA_VERSION,
        "held_out_rows": len(rows),
        "answer_tokens": sum(len(row.answer_ids) for row in rows),
        "vocabulary": _vocabulary(inputs),
        # Times differ from run to run; the ledger is to be the same bytes.
        "rows": [{key: value for key, value in asdict(row).items() if key != "seconds"} for row in ledger_rows],
        "quantization": facts,
    }
    (out / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
    before, after, last = ledger_rows[1], ledger_rows[2], ledger_rows[-1]
    return {
        "seconds_by_form": {row.name: round(row.seconds, 1) for row in ledger_rows},
        "summary": f"KL to the teacher: {before.kl_to_teacher:.3f} before, {after.kl_to_teacher:.3f} after, "
        f"{last.kl_to_teacher:.3f} as {last.name.removeprefix('GGUF ')}",
    }


def score_forms(
    forms: Sequence[Form], rows: Sequence[Row], vocabulary: int, scratch_folder: Path, report: Reporter
) -> list[LedgerRow]:
    """One ledger row per form; the first form is the teacher. A form's scores are kept only while others need them."""
    tokens = sum(len(row.answer_ids) for row in rows)
    _check_room(scratch_folder, needed=3 * tokens * vocabulary * 4)
    kept: dict[str, Scratch] = {}
    result: list[LedgerRow] = []
    for number, form in enumerate(forms):
        started = time.monotonic()
        needed_later = number == 0 or any(later.previous == form.name for later in forms[number + 1 :])
        own = Scratch(scratch_folder / f"{number}.f32", tokens, vocabulary) if needed_later else None
        to_teacher, to_previous, nll, at = Sums(), Sums(), 0.0, 0
        by_row: list[float] = []
        with bar(report, f"evaluate: {form.name}", total=len(rows), unit="row") as task:
            for row, scores in zip(rows, form.scores(), strict=True):
                logprobs = _common(scores, vocabulary, form.name, row)
                end = at + len(logprobs)
                if own is not None:
                    own.values[at:end] = logprobs
                nll -= float(logprobs[np.arange(len(logprobs)), list(row.answer_ids)].sum(dtype=np.float64))
                teacher = logprobs if number == 0 else np.array(kept[forms[0].name].values[at:end])
                by_row.append(to_teacher.add(teacher, logprobs))
                if form.previous is not None:
                    to_previous.add(np.array(kept[form.previous].values[at:end]), logprobs)
                at = end
                task.advance()
        if own is not None:
            kept[form.name] = own
        for name in [name for name in kept if not _needed(name, forms, number)]:
            kept.pop(name).close()
        compared = form.previous is not None
        result.append(
            LedgerRow(
                name=form.name,
                parameters=form.parameters,
                adapter_parameters=form.adapter_parameters,
                bytes=form.bytes,
                perplexity=float(np.exp(nll / tokens)),
                kl_to_teacher=to_teacher.kl / tokens,
                top1_agreement=to_teacher.agree / tokens,
                previous=form.previous,
                kl_to_previous=to_previous.kl / tokens if compared else None,
                top1_agreement_with_previous=to_previous.agree / tokens if compared else None,
                kl_to_teacher_by_row=tuple(by_row),
                tokens_by_row=tuple(len(row.answer_ids) for row in rows),
                seconds=time.monotonic() - started,
            )
        )
    for scratch in kept.values():
        scratch.close()
    return result


def _needed(name: str, forms: Sequence[Form], done: int) -> bool:
    later = forms[done + 1 :]
    return bool(later) and (name == forms[0].name or any(form.previous == name for form in later))


def _check_room(folder: Path, *, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        hint = "free some space, or hold out fewer or shorter rows"
        raise HostError(
            f"evaluate needs {needed >> 20} MiB for the time of its run, {free >> 20} MiB are free", hint=hint
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


def _vocabulary(inputs: Mapping[str, Path]) -> int:
    """Ids that every form has: the smaller of the two heads."""
    from transformers import AutoConfig

    return min(int(AutoConfig.from_pretrained(inputs[name]).vocab_size) for name in ("teacher", "merged"))


def _forms(inputs: Mapping[str, Path], rows: Sequence[Row], llama: LlamaCpp, batch_tokens: int) -> list[Form]:
    from toolchain.student.load import answer_logprobs, load_model
    from toolchain.student.merge import load_adapted
    from toolchain.student.precision import pick_device, weights_type

    device = pick_device()

    def checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Callable[[], Iterator[Logprobs]]:
        def scores() -> Iterator[Logprobs]:
            model, _ = load_model(path, dtype=dtype, device=device)
            yield from answer_logprobs(model, rows, batch_tokens=batch_tokens)

        return scores

    def adapted() -> Iterator[Logprobs]:
        yield from answer_logprobs(load_adapted(student, adapter).to(device), rows, batch_tokens=batch_tokens)

    def gguf(path: Path) -> Callable[[], Iterator[Logprobs]]:
        return lambda: gguf_score.answer_logprobs(path, rows, llama=llama)

    teacher, student, adapter, merged = (inputs[name] for name in ("teacher", "student", "adapter", "merged"))
    student_parameters, student_bytes = _weights(student)
    adapter_parameters, adapter_bytes = _weights(adapter)
    forms = [
        Form("teacher", None, *_checkpoint_size(teacher), checkpoint(teacher, weights_type(device))),
        Form("student before", None, student_parameters, 0, student_bytes, checkpoint(student)),
        Form(
            "student after",
            None,
            student_parameters,
            adapter_parameters,
            student_bytes + adapter_bytes,
            adapted,
        ),
        Form("merged", "student after", *_checkpoint_size(merged), checkpoint(merged)),
    ]
    previous = "merged"
    for name, path in (("GGUF 16-bit", inputs["gguf_16bit"]), ("", inputs["gguf_quantized"])):
        facts = read_facts(path)
        label = name or f"GGUF {facts.file_type}"
        forms.append(Form(label, previous, facts.parameters, 0, facts.file_bytes, gguf(path)))
        previous = label
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
