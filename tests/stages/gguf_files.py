"""Tiny checkpoints as GGUF: shared by the tests of this folder."""

from pathlib import Path
from typing import Any

from toolchain.gguf import convert
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Card
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
