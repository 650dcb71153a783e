"""Tiny checkpoints as GGUF, converted and served: shared by the tests of this folder."""

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def serving(llama: LlamaCpp, gguf: Path, *options: str) -> Iterator[str]:
    """The address of a llama-server's API, up to /v1, once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [str(llama.program("llama-server")), "-m", str(gguf), "--port", str(port), "-t", "1", "--jinja", *options]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            end_s = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    assert child.poll() is None, "llama-server ended"
                    assert time.monotonic() < end_s, "llama-server is not ready"
                    time.sleep(0.05)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.kill()
