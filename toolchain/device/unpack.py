"""Unpack a bundle's archive: signature, manifest, then each file as the manifest says, or nothing at all.

What comes is written under another name beside its place, flushed, and renamed when it is whole. A byte is written only
when the signature, where one is required, and the list of files have been found good.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import files, place, signature, tape
from .errors import DeviceError

_NOT_OURS = "do not use it: it was not packed by this toolchain, or was changed"


@dataclass(frozen=True)
class Head:
    """What an archive begins with, found good."""

    top: str
    """The bundle's folder; every path begins with it."""
    manifest: dict[str, Any]
    small: dict[str, bytes]
    """Manifest, SHA256SUMS and, where there is one, the signature."""
    verdict: signature.Verdict


def run(
    archive: Path,
    into: Path,
    *,
    required: signature.Policy | None,
    say: Callable[[str], None],
    name: Callable[[dict[str, Any]], str] | None = None,
) -> Path:
    """Unpack `archive` into a new folder below `into`, which is returned. Raises DeviceError; nothing is left then.

    The folder is called as in the archive, or by `name` from the manifest.
    """
    if not into.is_dir():
        raise DeviceError(f"{into}: no such folder", hint=f"mkdir -p {into}")
    with _opened(archive) as file:
        reader = tape.Reader(file, archive.name)
        head = read_head(reader, required)
        say(f"signature: {head.verdict.detail}")
        final = into / (head.top if name is None else name(head.manifest))
        if os.path.lexists(final):
            raise DeviceError(f"{final} is there already", hint="remove it, or unpack into another folder")
        place.check_room(into, head.manifest)
        with place.new_folder(final) as staged:
            for path, content in head.small.items():
                place.write(staged / path, 0o644, iter([content]))
            for path, blocks in read_rest(reader, head):
                place.write(staged / path, int(head.manifest["files"][path]["mode"], 8), blocks)
    say(f"{len(head.manifest['files'])} files as built")
    return final


def check(archive: Path, *, required: signature.Policy | None) -> Head:
    """Read `archive` to its end as `run` does, and write nothing. Raises DeviceError."""
    with _opened(archive) as file:
        reader = tape.Reader(file, archive.name)
        head = read_head(reader, required)
        for _, blocks in read_rest(reader, head):
            for _ in blocks:
                pass
    return head


def read_head(reader: tape.Reader, required: signature.Policy | None) -> Head:
    """The files that the rest is checked against. The signature comes first, then what it is for."""
    first = reader.describe(reader.peek())
    top = first.name.partition("/")[0]
    if first.name != f"{top}/{files.MANIFEST}" or not files.is_plain(top):
        raise DeviceError(
            f"the archive begins with {first.name!r}, not with a bundle's {files.MANIFEST}", hint=_NOT_OURS
        )
    small = {name: _small(reader, f"{top}/{name}") for name in (files.MANIFEST, files.SUMS)}
    if reader.describe(reader.peek()).name == f"{top}/{files.SIGNATURE}":
        small[files.SIGNATURE] = _small(reader, f"{top}/{files.SIGNATURE}")
    verdict = signature.check(small[files.SUMS], small.get(files.SIGNATURE), required)
    if not verdict.ok:
        raise DeviceError(f"signature: {verdict.detail}", hint="do not use it, unless you know why that is so")
    manifest = files.parse_manifest(small[files.MANIFEST])
    if files.bundle_id(manifest) != manifest.get("bundle_id"):
        raise DeviceError(f"{files.MANIFEST}: changed: its content does not give the id it states", hint=_NOT_OURS)
    digest = hashlib.sha256(small[files.MANIFEST]).hexdigest()
    if files.sums_text(manifest, digest).encode() != small[files.SUMS]:
        raise DeviceError(f"{files.SUMS}: changed: it does not list what the manifest lists", hint=_NOT_OURS)
    if files.folder_name(manifest) != top:
        raise DeviceError(f"the folder {top!r} holds the bundle {files.folder_name(manifest)!r}", hint=_NOT_OURS)
    return Head(top, manifest, small, verdict)


def _small(reader: tape.Reader, name: str) -> bytes:
    """The next file, which must be `name`."""
    block = reader.header()
    info = reader.describe(block)
    if info.name != name:
        raise DeviceError(f"the archive holds {info.name!r} where {name!r} must come", hint=_NOT_OURS)
    if not 0 <= info.size <= files.JSON_LIMIT_BYTES:
        raise DeviceError(f"{name} has {info.size} bytes: not a bundle's", hint=_NOT_OURS)
    if block != tape.header(name, mode=0o644, size=info.size):
        raise DeviceError(f"{name}: its header is not as this toolchain writes it", hint=_NOT_OURS)
    return b"".join(reader.content(info.size))


def read_rest(reader: tape.Reader, head: Head) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Each further file's path and content. A digest that differs is raised at the end of the content, anything that
    the manifest does not list at this place before it, and what follows the last file at the end."""
    listed = head.manifest["files"]
    for path in tape.order(head.manifest, signed=False)[2:]:
        facts = listed[path]
        block = reader.header()
        if block != tape.header(f"{head.top}/{path}", mode=int(facts["mode"], 8), size=facts["bytes"]):
            raise DeviceError(_what_differs(reader, block, head, path), hint=_NOT_OURS)
        yield path, _hashed(reader, path, facts)
    reader.end()


def _hashed(reader: tape.Reader, path: str, facts: dict[str, Any]) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for block in reader.content(facts["bytes"]):
        digest.update(block)
        yield block
    if digest.hexdigest() != facts["sha256"]:
        raise DeviceError(f"{path}: changed: SHA-256 differs", hint="copy the archive again")


def _what_differs(reader: tape.Reader, block: bytes, head: Head, path: str) -> str:
    """Why a header is not the one of `path`, which must come here."""
    info = reader.describe(block)
    found = info.name.removeprefix(f"{head.top}/")
    facts = head.manifest["files"].get(found)
    if found == info.name or facts is None:
        return f"the archive holds {info.name!r}, which its manifest does not list"
    if found != path:
        return f"the archive holds {found!r} where {path!r} must come: twice, or out of order"
    if info.size != facts["bytes"]:
        return f"{path}: changed: {info.size} bytes, the manifest says {facts['bytes']}"
    return f"{path}: its header is not as this toolchain writes it"


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[BinaryIO]:
    try:
        with archive.open("rb") as file:
            yield file
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DeviceError(
                f"no space left for {archive.name}: nothing was unpacked", hint="free some space, then unpack again"
            ) from None
        name = error.filename if error.filename is not None else archive
        raise DeviceError(f"{name}: {error.strerror}: nothing was unpacked") from None
