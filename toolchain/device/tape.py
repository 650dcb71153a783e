"""The one way in which archives of bundles are written and read: POSIX ustar, plain files, no times, no owners.

Python's tarfile writes other bytes from one version to the next, and reads far more than a bundle may hold: links,
devices, headers of any length. Here a header is a function of name, mode and size, so that the same bundle has the same
bytes everywhere, and what a device unpacks is compared with what it must be. pax specification of POSIX, "ustar
Interchange Format"; sizes from 8 GiB on in GNU's base 256.
"""

import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from .errors import DeviceError
from .files import MANIFEST, SIGNATURE, SUMS

BLOCK = 512
FILE, FOLDER = b"0", b"5"
END = bytes(2 * BLOCK)
_READ_BYTES = 1 << 20
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
}


def header(name: str, *, mode: int, size: int, kind: bytes = FILE) -> bytes:
    """The 512 bytes before a file's content, or of a folder. Raises DeviceError for a name too long for ustar."""
    prefix, base = _split(name)
    octal_limit = 8**11
    size_field = f"{size:011o}\0".encode() if size < octal_limit else b"\x80" + size.to_bytes(11, "big")
    before = base.ljust(100, b"\0") + f"{mode:07o}\0".encode() + b"0000000\0" * 2 + size_field + b"00000000000\0"
    after = kind + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + prefix.ljust(155, b"\0") + bytes(12)
    total = sum(before) + 8 * ord(" ") + sum(after)
    return before + f"{total:06o}\0 ".encode() + after


def _split(name: str) -> tuple[bytes, bytes]:
    """Prefix and name, at most 155 and 100 bytes, as ustar divides a path at a slash."""
    encoded = name.encode("ascii")
    if len(encoded) <= 100:
        return b"", encoded
    at = encoded.find(b"/", len(encoded) - 101)
    if not 0 < at <= 155:
        raise DeviceError(f"{name}: too long a path for an archive")
    return encoded[:at], encoded[at + 1 :]


def padding(size: int) -> bytes:
    """What fills a file's last block."""
    return bytes(-size % BLOCK)


def order(manifest: dict[str, Any], *, signed: bool) -> list[str]:
    """Paths of a bundle in the order of its archive: what the rest is checked against comes first, the model last."""
    model = str(manifest["model"]["file"])
    rest = sorted(path for path in manifest["files"] if path != model)
    return [MANIFEST, SUMS, *([SIGNATURE] if signed else []), *rest, model]


class Reader:
    """Reads an archive from front to back, without seeking."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._peeked = b""

    def header(self) -> bytes:
        """The next header. Raises DeviceError when the archive is cut short."""
        block, self._peeked = self._peeked or self._exactly(BLOCK), b""
        return block

    def peek(self) -> bytes:
        """The next header, which stays the next one."""
        self._peeked = self._peeked or self._exactly(BLOCK)
        return self._peeked

    def describe(self, block: bytes) -> tarfile.TarInfo:
        """What a header says, of a plain file. Raises DeviceError for everything that a bundle cannot hold."""
        if block[:2] == b"\x1f\x8b":
            raise DeviceError(f"{self._name} is compressed with gzip", hint="gunzip it first; bundles are plain .tar")
        if block == bytes(BLOCK):
            raise DeviceError(f"{self._name} ends before all its files have come", hint="copy the archive again")
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise DeviceError(
                f"{self._name} is no archive, or is damaged: {error}", hint="copy the archive again"
            ) from None
        if info.type != tarfile.REGTYPE:
            kind = _KINDS.get(info.type, f"an entry of type {info.type!r}")
            raise DeviceError(
                f"{self._name} holds {kind}, {info.name!r}: a bundle has plain files only", hint="do not use it"
            )
        return info

    def content(self, size: int) -> Iterator[bytes]:
        """The bytes of a file, in parts, and then its padding, which must be empty."""
        left = size
        while left:
            block = self._exactly(min(left, _READ_BYTES))
            left -= len(block)
            yield block
        if any(self._exactly(-size % BLOCK)):
            raise DeviceError(f"{self._name} is damaged between two files", hint="copy the archive again")

    def end(self) -> None:
        """Nothing but empty blocks is left, two of them at least. Raises DeviceError."""
        if any(self._exactly(len(END))):
            raise DeviceError(f"{self._name} holds more than its manifest lists", hint="do not use it")
        while block := self._file.read(_READ_BYTES):
            if any(block):
                raise DeviceError(f"{self._name} goes on after its end", hint="do not use it")

    def _exactly(self, size: int) -> bytes:
        block = self._file.read(size)
        if len(block) != size:
            raise DeviceError(f"{self._name} is cut short", hint="copy the archive again")
        return block
