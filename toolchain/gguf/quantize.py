"""16-bit GGUF + importance matrix → quantized GGUF. Writes model.gguf and quantize.json, which says what it really is.

With a search also plan.txt, and speed.json: tokens/s of the forms that were compared, which differ from run to run.

Which tensor gets which type is for llama-quantize to say, for a plan, or searched for ("error-aware", see search.py);
llama-quantize writes the file in any case. A searched plan is in plan.txt, and can be given to it by hand.

A file labelled Q4_K_M can hold little of it: rows whose width is no multiple of 256 take another type, larger or worse.
"""

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from toolchain import process
from toolchain.data.rows import Row, read_rows
from toolchain.disk import require_free
from toolchain.errors import ExternalToolError, RecipeError
from toolchain.evaluate.answer_scores import token_f1
from toolchain.evaluate.bootstrap import paired_interval
from toolchain.evaluate.divergence import Logprobs, kl
from toolchain.gguf import imatrix, score, search, speed
from toolchain.gguf.ggml import read_importance
from toolchain.gguf.header import GgufFacts, read_facts
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores
from toolchain.journal import Journal
from toolchain.recipe import FileType, Quantize
from toolchain.reporter import Reporter, bar

OUTPUT = "model.gguf"
RECORD = "quantize.json"
PLAN = "plan.txt"
SPEED = "speed.json"
ANSWERED = 32
"""Held-out questions that every form answers."""
_ROUNDS, _PROMPT_TOKENS, _NEW_TOKENS = 5, 256, 64
"""Of llama-bench."""
FULL, NO_MATRIX, STOCK, ERROR_AWARE = "16-bit", "stock, no matrix", "stock", "error-aware"

_FALLBACK = re.compile(
    r"warning: (\S+) +- ncols +(\d+) not divisible by +\d+ \(required for type +(\S+)\).*-> falling back to +(\S+)"
)
_FALLBACK_COUNT = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")
_SIZE = re.compile(r"quant size += +([\d.]+) MiB")
_UNQUANTIZED = ("F32", "F16", "BF16")
_MARGIN_BYTES = 32 << 20
"""Header, vocabulary and rounding of the size that llama-quantize foretells."""


@dataclass(frozen=True)
class Fallback:
    """A tensor that has another type than the mix wants, because of its row width."""

    tensor: str
    row_width: int
    wanted: str | None
    """None where llama-quantize chose another type without saying so (it does for output and embeddings)."""
    got: str


@dataclass(frozen=True)
class Inputs:
    """Paths. The rows and the plan are there where the settings need them."""

    gguf: Path
    imatrix: Path
    train: Path | None = None
    held_out: Path | None = None
    plan: Path | None = None


def run(settings: Quantize, inputs: Inputs, *, llama: LlamaCpp, out: Path, report: Reporter) -> dict[str, Any]:
    """Quantize `inputs.gguf` to `settings.file_type`; returns metrics with what quantize.json holds.

    Raises ModelError for a damaged input, DataError for too few rows, HostError when the disk is too small,
    RecipeError for a plan or target that cannot be, ExternalToolError otherwise.
    """
    started = time.perf_counter()
    quantizer = _LlamaQuantize(settings.file_type, inputs, llama, out, report)
    # llama-quantize leaves out what it finds no entry for.
    imatrix.check(read_importance(inputs.imatrix), quantizer.source, inputs.imatrix)
    target = out / OUTPUT
    allocation: dict[str, Any] = {"kind": settings.allocation}
    fallbacks: list[Fallback] = []
    if settings.allocation == "error-aware":
        allocation |= _error_aware(settings, inputs, quantizer, llama, out, report)
    elif inputs.plan is not None:
        allocation["kind"] = "plan"
        check_plan(inputs.plan)
        shutil.copyfile(inputs.plan, out / PLAN)
        quantizer.write(target, plan=out / PLAN)
    else:
        lines = quantizer.write(target)
        fallbacks = fallbacks_of(lines, read_facts(target), settings.file_type)
    facts = read_facts(target)
    record = {**describe(settings.file_type, facts, fallbacks), "allocation": allocation}
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return {
        **record,
        "summary": _summary(record),
        "seconds": round(time.perf_counter() - started, 3),
        "source_bytes": quantizer.source.file_bytes,
    }


def _summary(record: Mapping[str, Any]) -> str:
    size = f"{record['bits_per_weight']:.2f} bits per weight, {record['file_bytes'] / 1e6:.1f} MB"
    allocation = record["allocation"]
    if "held_out" not in allocation:
        note = f"{len(record['fallbacks'])} of {record['tensors']} tensors of another type than asked for"
        return f"{record['file_type']}: {size}" + ("" if allocation["kind"] == "plan" else f", {note}")
    forms, change = allocation["held_out"]["forms"], allocation["held_out"]["change"]
    taken = "error-aware" if allocation["taken"] else "stock kept: the gain is not beyond doubt"
    return (
        f"{record['file_type']}, {taken}: {size}, KL to 16-bit {forms[STOCK]['kl']:.4f} as stock, "
        f"{forms[ERROR_AWARE]['kl']:.4f} error-aware ({change['share']:+.1%})"
    )


class _LlamaQuantize:
    """llama-quantize on one source, with one importance matrix."""

    def __init__(self, file_type: FileType, inputs: Inputs, llama: LlamaCpp, out: Path, report: Reporter) -> None:
        self.source = read_facts(inputs.gguf)
        self._file_type, self._inputs, self._out, self._report = file_type, inputs, out, report
        self._program, self._log = llama.program("llama-quantize"), out / "logs" / "quantize.log"

    def write(self, target: Path, *, plan: Path | None = None, matrix: bool = True, files: int = 1) -> list[str]:
        """Write `target` and hand back what the tool said; there must be room for as many `files` of its size."""
        needed = self._foretell(target, plan, matrix) + _MARGIN_BYTES
        what = "the quantized model" if files == 1 else f"{files} quantized models"
        require_free(self._out, files * needed, what, report=self._report)
        try:
            return self._run(target, plan, matrix, label=f"quantizing to {self._file_type}")
        except (ExternalToolError, OSError):
            # llama-quantize does not say why it cannot write, and on a full disk its log cannot be written either.
            target.unlink(missing_ok=True)
            require_free(self._out, needed, "the quantized model")
            raise

    def _foretell(self, target: Path, plan: Path | None, matrix: bool) -> int:
        found = _SIZE.search("\n".join(self._run(target, plan, matrix, dry_run=True, label="planning")))
        if found is None:
            raise ExternalToolError("llama-quantize --dry-run tells no size", hint=f"full output: {self._log}")
        return int(float(found[1]) * 2**20)

    def _run(self, target: Path, plan: Path | None, matrix: bool, *, label: str, dry_run: bool = False) -> list[str]:
        lines: list[str] = []
        matrix_file = self._inputs.imatrix.resolve()
        with bar(self._report, label, total=len(self.source.tensors), unit="tensor") as task:

            def on_line(line: str) -> None:
                lines.append(line)
                if re.match(r"\[ *\d+/ *\d+\]", line):
                    task.advance()

            argv = quantize_argv(
                self._program,
                self._inputs.gguf.resolve(),
                target,
                self._file_type,
                matrix_file.name if matrix else None,
                plan=plan,
                dry_run=dry_run,
            )
            # The folder's name must not be in the file: llama-quantize records the matrix as it is called.
            process.run(argv, log=self._log, cwd=matrix_file.parent, on_line=on_line, hint=f"full output: {self._log}")
        return lines


def check_plan(path: Path) -> None:
    """Raises RecipeError at the first entry that is not `regular expression=type`: llama-quantize answers one with its
    usage and names no line."""
    hint = "an entry is a regular expression of tensor names, = and a type, such as ^output\\.weight$=q6_k"
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        for entry in line.split():
            pattern, _, kind = entry.partition("=")
            if kind.upper() not in GGMLQuantizationType.__members__:
                raise RecipeError(f"{path}: line {number}: {entry!r}: no type {kind!r}", hint=hint)
            try:
                re.compile(pattern)
            except re.error as error:
                message = f"{path}: line {number}: {pattern!r} is no regular expression: {error}"
                raise RecipeError(message, hint=hint) from error


def quantize_argv(
    program: Path,
    source: Path,
    out: Path,
    file_type: FileType,
    matrix: str | None,
    *,
    plan: Path | None,
    dry_run: bool,
) -> list[str]:
    options = [] if matrix is None else ["--imatrix", matrix]
    options += ["--dry-run"] if dry_run else []
    if plan is not None:
        options += ["--tensor-type-file", str(plan.absolute())]
    files = [str(source), str(out.absolute()), file_type, str(physical_cores())]
    return [str(program), *options, *files]


# --- Error-aware allocation.


def _error_aware(
    settings: Quantize, inputs: Inputs, quantizer: _LlamaQuantize, llama: LlamaCpp, out: Path, report: Reporter
) -> dict[str, Any]:
    """Write the better one of a searched plan and stock to OUTPUT; what was found, for the record."""
    assert inputs.train is not None
    assert inputs.held_out is not None
    target, other, plain = out / OUTPUT, out / "stock.gguf", out / "no-matrix.gguf"
    quantizer.write(other, files=3)
    stock = read_facts(other)
    types = {tensor.name: tensor.type for tensor in stock.tensors if tensor.type not in _UNQUANTIZED}
    shapes = {tensor.name: tensor for tensor in stock.tensors}
    budget = _budget(settings, stock, search.bytes_of(types, shapes))
    _check_budget(settings, budget, search.smallest_bytes(types, shapes, settings.types))
    with Journal(out / "resume" / "search.jsonl") as journal:
        found = search.choose(
            inputs.gguf,
            stock=types,
            shapes=shapes,
            kinds=settings.types,
            budget=budget,
            importance=read_importance(inputs.imatrix),
            rows=read_rows(inputs.train),
            tokens=settings.search_tokens,
            trials=settings.search_trials,
            llama=llama,
            journal=journal,
            report=report,
        )
    (out / PLAN).write_text(search.render(found.plan), encoding="utf-8")
    quantizer.write(target, plan=out / PLAN)
    made = read_facts(target)
    unlike = [tensor for tensor in made.tensors if found.plan.get(tensor.name, tensor.type) != tensor.type]
    if unlike:
        raise ExternalToolError(f"llama-quantize gave {unlike[0].name} {unlike[0].type}, the plan says otherwise")
    quantizer.write(plain, matrix=False)
    files = {FULL: inputs.gguf, NO_MATRIX: plain, STOCK: other, ERROR_AWARE: target}
    held_out = _held_out(inputs, files, llama, report)
    plain.unlink()
    timed = {name: files[name] for name in (FULL, STOCK, ERROR_AWARE)}
    samples = speed.in_turns(
        timed, llama=llama, rounds=_ROUNDS, prompt_tokens=_PROMPT_TOKENS, new_tokens=_NEW_TOKENS,
        log=out / "logs" / "speed.log", report=report,
    )  # fmt: skip
    speeds = {kind: speed.summary(samples, kind, against=STOCK) for kind in ("prefill", "decode")}
    conditions = {"prompt_tokens": _PROMPT_TOKENS, "new_tokens": _NEW_TOKENS}
    (out / SPEED).write_text(json.dumps({**conditions, **speeds}, indent=1) + "\n", encoding="utf-8")
    resized = settings.target_bytes is not None or settings.target_bits is not None
    high = held_out["change"]["high"]
    taken = resized or (high is not None and high < 0 and made.file_bytes <= stock.file_bytes)
    if taken:
        other.unlink()
    else:
        other.replace(target)
    return {
        "taken": taken,
        "stock_types": types,
        "plan_types": found.plan,
        "held_out": held_out,
        "search": {
            "kl": found.kl,
            "stock_kl": found.stock_kl,
            "predicted_kl": found.predicted_kl,
            "trials": found.trials,
            "answer_tokens": found.tokens,
            "sensitivity": found.sensitivity,
        },
    }


def _budget(settings: Quantize, stock: GgufFacts, stock_bytes: int) -> int:
    """Bytes for what is quantized: all that stock takes for it, or what the target leaves beside the rest."""
    target = settings.target_bytes
    if settings.target_bits is not None:
        target = int(settings.target_bits * stock.parameters / 8)
    return stock_bytes if target is None else target - (stock.tensor_bytes - stock_bytes)


def _check_budget(settings: Quantize, budget: int, least: int) -> None:
    if budget < least:
        name = "target_bytes" if settings.target_bytes is not None else "target_bits"
        raise RecipeError(
            f"quantize.{name} is {getattr(settings, name)}: that leaves {max(budget, 0):,} bytes for the tensors that "
            f"are quantized, and with quantize.types they take at least {least:,}",
            hint=f"raise quantize.{name}, or add a smaller type to quantize.types",
        )


def _held_out(inputs: Inputs, files: Mapping[str, Path], llama: LlamaCpp, report: Reporter) -> dict[str, Any]:
    """What each file loses against the first over the held-out answers, as llama.cpp runs it, and what the last gains
    on STOCK, with its interval."""
    from toolchain.teacher.gguf_decode import greedy_texts

    assert inputs.held_out is not None
    rows = read_rows(inputs.held_out)
    sums = {name: _Sums() for name in files}
    scored = [score.answer_logprobs(path, rows, llama=llama) for path in files.values()]
    with bar(report, "held-out answers", total=len(rows), unit="row") as task:
        for row, *logprobs in zip(rows, *scored, strict=True):
            reference = logprobs[0]
            p = np.exp(reference)
            for name, found in zip(files, logprobs, strict=True):
                sums[name].add(row, p, reference, found)
            task.advance()
    tokens = np.array([len(row.answer_ids) for row in rows])
    before, after = (np.array([kl.mean() for kl in sums[name].kl]) for name in (STOCK, ERROR_AWARE))
    low, high = paired_interval(after - before, tokens) or (None, None)
    asked = rows[:ANSWERED]
    figures = {
        name: {
            **sums[name].figures(read_facts(path)),
            "answer_f1": _answer_f1(greedy_texts(path, asked, llama=llama, report=report), asked),
        }
        for name, path in files.items()
    }
    change = figures[ERROR_AWARE]["kl"] - figures[STOCK]["kl"]
    return {
        "forms": figures,
        "change": {"difference": change, "low": low, "high": high, "share": change / figures[STOCK]["kl"]},
        "rows": len(rows),
        "answered": len(asked),
        "answer_tokens": int(tokens.sum()),
    }


def _answer_f1(texts: Sequence[str], rows: Sequence[Row]) -> float:
    """Mean token F1 of the answers to the teacher's."""
    return float(np.mean([token_f1(text, row.answer) for text, row in zip(texts, rows, strict=True)]))


class _Sums:
    """One file's scores, row by row."""

    def __init__(self) -> None:
        self.kl: list[npt.NDArray[np.float64]] = []
        """KL(16-bit ‖ this) at each position of a row, nats."""
        self._same = 0
        self._nll = 0.0

    def add(self, row: Row, p: Logprobs, reference: Logprobs, found: Logprobs) -> None:
        """`p` is exp(reference), taken once for all files."""
        self.kl.append(kl(reference, found, p=p))
        self._same += int((reference.argmax(-1) == found.argmax(-1)).sum())
        self._nll -= float(found[np.arange(len(found)), list(row.answer_ids)].sum(dtype=np.float64))

    def figures(self, facts: GgufFacts) -> dict[str, Any]:
        kl = np.concatenate(self.kl)
        return {
            "file_bytes": facts.file_bytes,
            "bits_per_weight": facts.bits_per_weight,
            "kl": float(kl.mean()),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "same_top": self._same / len(kl),
            "perplexity": float(np.exp(self._nll / len(kl))),
            "kl_by_row": [float(row.mean()) for row in self.kl],
        }


def fallbacks_of(lines: Sequence[str], facts: GgufFacts, file_type: FileType) -> list[Fallback]:
    """Tensors that fell back, as llama-quantize told and as the file shows.

    Raises ExternalToolError when the two do not agree: then the tool's output is not what this reads.
    """
    told = {
        found[1]: Fallback(found[1], int(found[2]), found[3].upper(), found[4].upper())
        for line in lines
        if (found := _FALLBACK.search(line))
    }
    count = next((int(found[1]) for line in lines if (found := _FALLBACK_COUNT.search(line))), 0)
    tensors = {tensor.name: tensor for tensor in facts.tensors}
    wrong = [item for item in told.values() if tensors[item.tensor].type != item.got]
    if wrong or count != len(told):
        raise ExternalToolError(
            f"llama-quantize tells of {count} fallbacks, {len(told)} were read, {len(wrong)} are not so in the file",
            hint="its output differs from that of the llama.cpp pinned in docker/versions.toml",
        )
    block = 256 if "_K" in file_type else 32
    silent = [
        Fallback(tensor.name, tensor.shape[0], None, tensor.type)
        for tensor in facts.tensors
        if len(tensor.shape) > 1 and tensor.shape[0] % block and tensor.type != "F32" and tensor.name not in told
    ]
    return sorted([*told.values(), *silent], key=lambda item: item.tensor)


def describe(file_type: FileType, facts: GgufFacts, fallbacks: Sequence[Fallback]) -> dict[str, Any]:
    """What quantize.json holds."""
    return {
        "file_type": file_type,
        "file_bytes": facts.file_bytes,
        "tensor_bytes": facts.tensor_bytes,
        "parameters": facts.parameters,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "tensors": len(facts.tensors),
        "tensor_types": facts.tensor_types,
        "fallbacks": [asdict(item) for item in fallbacks],
    }
