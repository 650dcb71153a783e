"""16-bit GGUF + importance matrix → quantized GGUF. Writes model.gguf and quantize.json, which says what it really is.

A file labelled Q4_K_M can hold little of it: rows whose width is no multiple of 256 take another type, larger or worse.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain import process
from toolchain.disk import require_free
from toolchain.errors import ExternalToolError
from toolchain.gguf.header import GgufFacts, read_facts
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores
from toolchain.recipe import FileType, Quantize
from toolchain.reporter import Reporter, bar

OUTPUT = "model.gguf"
RECORD = "quantize.json"

_FALLBACK = re.compile(
    r"warning: (\S+) +- ncols +(\d+) not divisible by +\d+ \(required for type +(\S+)\).*-> falling back to +(\S+)"
)
_FALLBACK_COUNT = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")
_SIZE = re.compile(r"quant size += +([\d.]+) MiB")
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


def run(
    settings: Quantize, *, gguf: Path, imatrix: Path, llama: LlamaCpp, out: Path, report: Reporter
) -> dict[str, Any]:
    """Quantize `gguf` to `settings.file_type`; returns metrics with what quantize.json holds.

    Raises ModelError for a damaged input, HostError when the disk is too small, ExternalToolError otherwise.
    """
    started = time.perf_counter()
    source = read_facts(gguf)
    target, log = out / OUTPUT, out / "logs" / "quantize.log"
    program = llama.program("llama-quantize")

    def quantize(target: Path, *, dry_run: bool, label: str) -> list[str]:
        lines: list[str] = []
        with bar(report, label, total=len(source.tensors), unit="tensor") as task:

            def on_line(line: str) -> None:
                lines.append(line)
                if re.match(r"\[ *\d+/ *\d+\]", line):
                    task.advance()

            argv = quantize_argv(program, gguf.resolve(), target, settings.file_type, imatrix.name, dry_run=dry_run)
            # The folder's name must not be in the file: llama-quantize records the matrix as it is called.
            process.run(argv, log=log, cwd=imatrix.resolve().parent, on_line=on_line, hint=f"full output: {log}")
        return lines

    plan = "\n".join(quantize(target, dry_run=True, label="planning"))
    foretold = _SIZE.search(plan)
    if foretold is None:
        raise ExternalToolError("llama-quantize --dry-run tells no size", hint=f"full output: {log}")
    needed = int(float(foretold[1]) * 2**20) + _MARGIN_BYTES
    require_free(out, needed, "the quantized model")
    try:
        lines = quantize(target, dry_run=False, label=f"quantizing to {settings.file_type}")
    except (ExternalToolError, OSError):
        # llama-quantize does not say why it cannot write, and on a full disk its log cannot be written either.
        target.unlink(missing_ok=True)
        require_free(out, needed, "the quantized model")
        raise
    facts = read_facts(target)
    record = describe(settings.file_type, facts, fallbacks_of(lines, facts, settings.file_type))
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    summary = (
        f"{record['file_type']}: {record['bits_per_weight']:.2f} bits per weight, {record['file_bytes'] / 1e6:.1f} MB, "
        f"{len(record['fallbacks'])} of {record['tensors']} tensors of another type than asked for"
    )
    return {
        **record,
        "summary": summary,
        "seconds": round(time.perf_counter() - started, 3),
        "source_bytes": source.file_bytes,
    }


def quantize_argv(
    program: Path, source: Path, out: Path, file_type: FileType, imatrix: str, *, dry_run: bool
) -> list[str]:
    options = ["--dry-run"] if dry_run else []
    files = [str(source), str(out.absolute()), file_type, str(physical_cores())]
    return [str(program), "--imatrix", imatrix, *options, *files]


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
