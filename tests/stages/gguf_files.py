"""Tiny checkpoints as GGUF: shared by the tests of this folder."""

from pathlib import Path
from typing import Any

from toolchain.gguf import convert, imatrix
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Card, Imatrix
from toolchain.reporter import Silent


def to_gguf(
    model: Path,
    out: Path,
    llama: LlamaCpp,
    *,
    name: str = "tiny",
    card: Card | None = None,
    max_kl: float = 1e-3,
) -> dict[str, Any]:
    """`out`/model-f16.gguf by the stage; its metrics."""
    return convert.run(
        card or Card(),
        model=model,
        name=name,
        version="0.1.0",
        max_kl=max_kl,
        llama=llama,
        out=out,
        report=Silent(),
    )


def to_matrix(gguf: Path, rows: Path, tokenizer: Path, llama: LlamaCpp, out: Path) -> Path:
    """The importance matrix of `gguf` from `rows`, in chunks of 64 tokens, by the stage."""
    out.mkdir(exist_ok=True)
    settings = Imatrix(context=64)
    imatrix.run(settings, gguf=gguf, rows=rows, tokenizer=tokenizer, llama=llama, out=out, report=Silent())
    return out / imatrix.OUTPUT
