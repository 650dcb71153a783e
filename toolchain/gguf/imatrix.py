"""Training rows → importance matrix. Reads a 16-bit GGUF and the rows; writes calibration.txt and imatrix.gguf.

The text is what the model will see in use: every row with its chat template's special tokens, which llama-imatrix
reads as such. It is computed part by part, and the parts are added up.
"""

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolchain import process
from toolchain.data.rows import Row, read_rows
from toolchain.errors import DataError, ExternalToolError, ModelError
from toolchain.gguf.ggml import Floats, read_importance
from toolchain.gguf.header import GgufFacts, read_facts, read_metadata
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores
from toolchain.recipe import Imatrix
from toolchain.reporter import Reporter, bar

OUTPUT = "imatrix.gguf"
TEXT = "calibration.txt"
_OWN = "give one that was computed on this model, or leave imatrix.file out: then it is computed"
_PART_CHUNKS = 25
"""What a kill can cost: each part's matrix is kept as soon as it is done."""


def run(
    settings: Imatrix,
    *,
    gguf: Path,
    rows: Path,
    tokenizer: Path,
    given: Path | None = None,
    llama: LlamaCpp,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Compute the importance matrix of `gguf` over `rows` (a file of rows); `tokenizer` is its checkpoint folder.

    `given` is a matrix to take instead. Returns metrics. Raises DataError when there is too little text, ModelError for
    a matrix of another model, ExternalToolError when llama-imatrix fails.
    """
    started = time.perf_counter()
    if given is not None:
        check(read_importance(given), read_facts(gguf), given)
        shutil.copyfile(given, out / OUTPUT)
        return {"summary": "taken from imatrix.file", "seconds": round(time.perf_counter() - started, 3)}
    taken = read_rows(rows)
    tokens = _tokens(taken)
    # llama-imatrix refuses fewer than two contexts of text, whatever it is asked for.
    if tokens < 2 * settings.context:
        raise DataError(
            f"{tokens} tokens in {len(taken)} training rows, "
            f"an importance matrix over contexts of {settings.context} needs {2 * settings.context}",
            hint=f"add rows, or set imatrix.context to {max(64, tokens // 2)} or less",
        )
    if settings.max_chunks is not None:
        taken = _first(taken, settings.max_chunks * settings.context)
    split = _split(taken, _PART_CHUNKS * settings.context, least=2 * settings.context)
    texts = [render(part, tokenizer) for part in split]
    text = "".join(texts)
    (out / TEXT).write_text(text, encoding="utf-8")
    program = _LlamaImatrix(llama, gguf, settings.context, out / "logs" / "imatrix.log")
    folder = out / "resume"
    folder.mkdir(exist_ok=True)
    chunks = 0
    parts = []
    with bar(report, "importance matrix", total=_tokens(taken), unit="token") as task:
        for number, part in enumerate(split):
            made = folder / f"part-{number}.gguf"
            name = f"part-{number}.txt"
            if not made.is_file():
                (folder / name).write_text(texts[number], encoding="utf-8")
                program.compute(folder, name, made)
            parts.append(made.name)
            chunks += read_metadata(made)["imatrix.chunk_count"]
            task.advance(_tokens(part))
    program.combine(folder, parts, out / OUTPUT)
    check(read_importance(out / OUTPUT), read_facts(gguf), out / OUTPUT)
    return {
        "summary": f"{chunks} chunks of {settings.context} tokens",
        "seconds": round(time.perf_counter() - started, 3),
        "rows": len(taken),
        "tokens": _tokens(taken),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "chunks": chunks,
        "threads": physical_cores(),
    }


def check(importance: Mapping[str, Floats], facts: GgufFacts, path: Path) -> None:
    """Raises ModelError where a matrix is not of the model that `facts` describe, or holds what is not a number."""
    tensors = {tensor.name: tensor for tensor in facts.tensors}
    for name, values in importance.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelError(f"{path}: an importance matrix of another model: this one has no {name}", hint=_OWN)
        experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
        if values.size != tensor.shape[0] * experts:
            raise ModelError(
                f"{path}: an importance matrix of another model: {values.size} columns for {name}, which has "
                f"{tensor.shape[0] * experts}",
                hint=_OWN,
            )
        if not np.isfinite(values).all():
            raise ModelError(f"{path}: {name} has a value that is not finite", hint="compute the matrix again")


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.token_ids) for row in rows)


def _first(rows: Sequence[Row], tokens: int) -> list[Row]:
    """The first rows that have so many tokens together."""
    taken, total = [], 0
    for row in rows:
        if total >= tokens:
            break
        taken.append(row)
        total += len(row.token_ids)
    return taken


def _split(rows: Sequence[Row], tokens: int, *, least: int) -> list[list[Row]]:
    """Parts of so many tokens; what is left at the end and has fewer than `least` goes to the last part."""
    parts: list[list[Row]] = [[]]
    for row in rows:
        if _tokens(parts[-1]) >= tokens:
            parts.append([])
        parts[-1].append(row)
    if len(parts) > 1 and _tokens(parts[-1]) < least:
        last = parts.pop()
        parts[-1] += last
    return parts


class _LlamaImatrix:
    """llama-imatrix on one model."""

    def __init__(self, llama: LlamaCpp, gguf: Path, context: int, log: Path) -> None:
        self._program, self._gguf, self._context, self._log = llama.program("llama-imatrix"), gguf, context, log

    def compute(self, folder: Path, text: str, made: Path) -> None:
        """The matrix over a text in `folder`, under its name when it is whole."""
        non_finite: list[str] = []

        def on_line(line: str) -> None:
            if "non-finite values" in line:
                non_finite.append(line.strip())

        draft = made.with_suffix(".draft")
        # Names, not paths: llama-imatrix writes the text's name into its output.
        argv = imatrix_argv(
            self._program, self._gguf.resolve(), text, draft.name, context=self._context, threads=physical_cores()
        )
        process.run(argv, log=self._log, cwd=folder, on_line=on_line, hint=f"full output: {self._log}")
        if non_finite or not draft.is_file():
            cause = non_finite[0] if non_finite else "it wrote no matrix"
            raise ExternalToolError(f"llama-imatrix: {cause}", hint=f"full output: {self._log}")
        draft.rename(made)

    def combine(self, folder: Path, parts: Sequence[str], made: Path) -> None:
        # It asks for a model, and does not open it.
        argv = [
            str(self._program),
            "-m",
            str(self._gguf.resolve()),
            "-o",
            str(made.resolve()),
            "-c",
            str(self._context),
        ]
        argv += [word for part in parts for word in ("--in-file", part)]
        process.run(argv, log=self._log, cwd=folder, hint=f"full output: {self._log}")
        if not made.is_file():
            raise ExternalToolError("llama-imatrix: it wrote no matrix", hint=f"full output: {self._log}")


def render(rows: Sequence[Row], tokenizer: Path) -> str:
    """Every row as text, special tokens spelled out, one after another."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    texts = (
        loaded.decode(row.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows
    )
    return "".join(text + "\n" for text in texts)


def imatrix_argv(program: Path, gguf: Path, text: str, out: str, *, context: int, threads: int) -> list[str]:
    """llama-imatrix over a text in the current folder."""
    return [
        *[str(program), "-m", str(gguf), "-f", text, "-o", out, "-c", str(context)],
        *["--parse-special", "--no-escape", "--no-ppl", "-t", str(threads)],
    ]
