"""Training rows → importance matrix. Reads a 16-bit GGUF and the rows; writes calibration.txt and imatrix.gguf.

The text is what the model will see in use: every row with its chat template's special tokens, which llama-imatrix
reads as such.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain import process
from toolchain.data.rows import Row, read_rows
from toolchain.errors import DataError, ExternalToolError
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores
from toolchain.recipe import Imatrix
from toolchain.reporter import Reporter, bar

OUTPUT = "imatrix.gguf"
TEXT = "calibration.txt"


def run(
    settings: Imatrix, *, gguf: Path, rows: Path, tokenizer: Path, llama: LlamaCpp, out: Path, report: Reporter
) -> dict[str, Any]:
    """Compute the importance matrix of `gguf` over `rows` (a file of rows); `tokenizer` is its checkpoint folder.

    Returns metrics. Raises DataError when there is too little text, ExternalToolError when llama-imatrix fails.
    """
    started = time.perf_counter()
    taken = read_rows(rows)
    tokens = sum(len(row.token_ids) for row in taken)
    # llama-imatrix refuses fewer than two contexts of text, whatever it is asked for.
    if tokens < 2 * settings.context:
        raise DataError(
            f"{tokens} tokens in {len(taken)} training rows, "
            f"an importance matrix over contexts of {settings.context} needs {2 * settings.context}",
            hint=f"add rows, or set imatrix.context to {max(64, tokens // 2)} or less",
        )
    (out / TEXT).write_text(render(taken, tokenizer), encoding="utf-8")
    available = tokens // settings.context
    chunks = available if settings.max_chunks is None else min(settings.max_chunks, available)
    log = out / "logs" / "imatrix.log"
    non_finite: list[str] = []
    with bar(report, "importance matrix", total=chunks, unit="chunk") as task:
        done = computed = 0

        def on_line(line: str) -> None:
            nonlocal done, computed
            planned = re.search(r"computing over (\d+) chunks", line)
            if planned:
                computed = int(planned[1])
            if "non-finite values" in line:
                non_finite.append(line.strip())
            stored = re.search(r"stored collected data after (\d+) chunks", line)
            if stored and int(stored[1]) > done:
                task.advance(int(stored[1]) - done)
                done = int(stored[1])

        # Names, not paths: llama-imatrix writes the text's name into its output.
        process.run(
            imatrix_argv(
                llama.program("llama-imatrix"),
                gguf.resolve(),
                context=settings.context,
                max_chunks=settings.max_chunks,
                threads=physical_cores(),
            ),
            log=log,
            cwd=out,
            on_line=on_line,
            hint=f"full output: {log}",
        )
    if non_finite or not (out / OUTPUT).is_file():
        cause = non_finite[0] if non_finite else f"wrote no {OUTPUT}"
        raise ExternalToolError(f"llama-imatrix: {cause}", hint=f"full output: {log}")
    return {
        "summary": f"{computed} chunks of {settings.context} tokens",
        "seconds": round(time.perf_counter() - started, 3),
        "rows": len(taken),
        "tokens": tokens,
        "chunks": computed,
        "threads": physical_cores(),
    }


def render(rows: Sequence[Row], tokenizer: Path) -> str:
    """Every row as text, special tokens spelled out, one after another."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    texts = (
        loaded.decode(row.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows
    )
    return "".join(text + "\n" for text in texts)


def imatrix_argv(program: Path, gguf: Path, *, context: int, max_chunks: int | None, threads: int) -> list[str]:
    """llama-imatrix over calibration.txt in the current folder."""
    chunks = [] if max_chunks is None else ["--chunks", str(max_chunks)]
    return [
        *[str(program), "-m", str(gguf), "-f", TEXT, "-o", OUTPUT, "-c", str(context), *chunks],
        *["--parse-special", "--no-escape", "--no-ppl", "-t", str(threads)],
        *["--output-frequency", "1", "-lv", "5"],  # 5 is the level that tells of each chunk
    ]
