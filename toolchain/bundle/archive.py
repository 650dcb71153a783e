"""A bundle as one archive: the same bytes wherever and whenever it is packed, each byte of the bundle read once.

Not compressed: a quantized model does not shrink (docs/bundles.md has figures), and what a compressor writes differs
from one version of it to the next.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from toolchain.bundle import seal
from toolchain.device import files, signature, tape
from toolchain.disk import require_free
from toolchain.errors import ArtifactError, HostError
from toolchain.reporter import Reporter, bar

_BLOCK_BYTES = 1 << 20


def pack(folder: Path, out: Path, *, report: Reporter, force: bool = False) -> dict[str, Any]:
    """Write the bundle in `folder` to the file `out`; its SHA-256 and size come back.

    Raises ArtifactError when the bundle is not as built, HostError for the disk, or a file that is there without
    `force`.
    """
    bundle = open_to_pack(folder)
    top = files.folder_name(bundle.manifest)
    paths = tape.order(bundle.manifest, signed=(folder / files.SIGNATURE).is_file())
    size = total_bytes(bundle)
    with finished(out, folder, size, force=force) as file, bar(report, "pack", total=len(paths), unit="file") as task:
        writer = Writer(file.write)
        for path in paths:
            writer.add(f"{top}/{path}", bundle, path)
            task.advance()
        digest, size = writer.end()
    report.line(f"{out}: {size / 2**20:.1f} MiB, sha256:{digest[:12]}…")
    return {"sha256": digest, "bytes": size}


def open_to_pack(folder: Path) -> files.Bundle:
    """The bundle, once all but its digests are found good: those are taken while it is packed. Raises ArtifactError."""
    bundle = seal.open_whole(folder, read=False)
    signed = folder / files.SIGNATURE
    if signed.is_file():
        verdict = signature.check((folder / files.SUMS).read_bytes(), signed.read_bytes(), None)
        if not verdict.ok:
            raise ArtifactError(f"{folder}: signature: {verdict.detail}", hint=f"toolchain sign {folder} --key KEY")
    return bundle


def total_bytes(bundle: files.Bundle) -> int:
    """Of all files but the manifest and what is about it."""
    return sum(int(facts["bytes"]) for facts in bundle.manifest["files"].values())


@contextlib.contextmanager
def finished(out: Path, folder: Path, size: int, *, force: bool) -> Iterator[BinaryIO]:
    """A file that becomes `out` as a whole, or nothing at all. Raises HostError."""
    if out.exists() and not (force and out.is_file()):
        raise HostError(f"{out} is there already", hint="give another --out, or --force to replace a file")
    if not out.absolute().parent.is_dir():
        raise HostError(f"{out.absolute().parent}: no such folder", hint=f"mkdir -p {out.absolute().parent}")
    if out.resolve().is_relative_to(folder.resolve()):
        raise HostError(f"{out}: is inside the bundle, whose files are sealed", hint="give another --out")
    require_free(out.absolute().parent, size, f"packing {folder.name}")
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o644)
        draft.rename(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HostError(f"{out}: no space left, nothing was written", hint="free some space") from error
        raise HostError(f"{error.filename or out}: {error.strerror}; {out} was not written") from error
    finally:
        draft.unlink(missing_ok=True)


class Writer:
    """Writes a tar as tape.py has it, and knows its own digest."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._out = write
        self._digest = hashlib.sha256()
        self._size = 0
        self._folders: set[str] = set()

    def folders(self, name: str) -> None:
        """Entries for every folder above `name` that has none yet."""
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth]) + "/"
            if folder not in self._folders:
                self._folders.add(folder)
                self._write(tape.header(folder, mode=0o755, size=0, kind=tape.FOLDER))

    def add(self, name: str, bundle: files.Bundle, path: str) -> None:
        """The bundle's file `path` under `name`. Raises ArtifactError when it is not what the manifest lists."""
        file = bundle.root / path
        facts = bundle.manifest["files"].get(path)
        size = int(facts["bytes"]) if facts else file.stat().st_size
        expected = str(facts["sha256"]) if facts else None
        if path == files.MANIFEST:
            expected = bundle.manifest_sha256
        with seal.as_ours():
            self._write(tape.header(name, mode=int(facts["mode"], 8) if facts else 0o644, size=size))
        digest, left = hashlib.sha256(), size
        with file.open("rb") as source:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                left -= len(block)
                self._write(block)
        if left or (expected is not None and digest.hexdigest() != expected):
            raise ArtifactError(f"{file}: its bytes have changed since it was made", hint="build the bundle again")
        self._write(tape.padding(size))

    def end(self) -> tuple[str, int]:
        """Close the archive; its SHA-256 in hex, and its bytes."""
        self._write(tape.END)
        return self._digest.hexdigest(), self._size

    def _write(self, block: bytes) -> None:
        self._digest.update(block)
        self._size += len(block)
        self._out(block)
