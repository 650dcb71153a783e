"""An older Debian's C and C++ libraries, for this host's compiler to build x86-64 programs against: what is built runs
on every system whose glibc is as old or newer. No root, no container.

Laid out without Debian's folders by processor, so that the compilers of other distributions find their way as well.
"""

import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from toolchain.errors import HostError
from toolchain.gguf import pinned
from toolchain.reporter import Reporter
from toolchain.resources import versions

PLACEHOLDER = "{sysroot}"
"""Stands for its folder in a profile's CMake options."""
LIBRARIES = ("libstdc++.so.6", "libgcc_s.so.1")
"""Beside glibc: what its programs need, to be taken along."""

_TRIPLET = "x86_64-linux-gnu"
_FREE_BYTES = 150_000_000
_AR_MAGIC, _AR_HEADER_BYTES = b"!<arch>\n", 60


def line() -> str:
    """What it is, for the key of a build."""
    return "; ".join(f"{package['name']} {package['version']}" for package in _pins()["packages"])


def make(cache: Path, *, report: Reporter) -> Path:
    """Its folder below `cache`, put together at the first call: 9 MB to fetch, 40 MB to keep.

    Raises HostError without room, ExternalToolError when a package cannot be had.
    """
    pins = _pins()

    def fill(out: Path) -> None:
        for package in pins["packages"]:
            archive = cache / "downloads" / package["file"].rpartition("/")[2]
            report.line(f"fetching {package['name']} {package['version']}")
            pinned.from_mirrors(pins["mirrors"], package["file"], package["sha256"], archive)
            _unpack(archive, out)
        _lay_out(out)

    return pinned.once(cache / "sysroot", pins["packages"], fill, what="the sysroot", needed=_FREE_BYTES, report=report)


def compiler_flags(folder: Path) -> str:
    """For C++: its library's headers instead of the compiler's own."""
    (headers,) = (folder / "usr" / "include" / "c++").iterdir()
    return f"-nostdinc++ -isystem {headers} -isystem {headers / _TRIPLET} -isystem {headers / 'backward'}"


def link_flags(folder: Path) -> str:
    """Its start files and libraries are found before the host's, which lie beside the compiler."""
    return f"-B{folder}/usr/lib"


def _pins() -> dict[str, Any]:
    pins: dict[str, Any] = versions()["sysroot"]
    return pins


def _unpack(package: Path, out: Path) -> None:
    """Headers and libraries of a Debian package."""
    with tarfile.open(fileobj=io.BytesIO(_data(package))) as tar:
        for member in tar:
            place = _place(member.name)
            if place is None or not (member.isreg() or member.issym()):
                continue
            path = out / place
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.issym():
                path.unlink(missing_ok=True)
                path.symlink_to(PurePosixPath(member.linkname).name)  # its libraries lie in one folder
            else:
                member.name = str(place)
                tar.extract(member, out, **pinned.tar_filter())


def _place(name: str) -> PurePosixPath | None:
    """Where a package's file goes; None for what neither compiler nor linker reads."""
    parts = [part for part in PurePosixPath(name).parts if part != _TRIPLET]
    if parts[:2] == ["usr", "include"]:
        if parts[2:3] == ["c++"] and _TRIPLET in PurePosixPath(name).parts[:3]:
            parts.insert(4, _TRIPLET)  # beside the C++ library's other headers there are some of the same names
        return PurePosixPath(*parts)
    if parts[-2:-1] in (["lib"], ["lib64"]) and len(parts) <= 3:
        return PurePosixPath("usr", "lib", parts[-1])
    return None


def _data(package: Path) -> bytes:
    """The tar in a .deb, which is an ar archive."""
    for name, content in _members(package.read_bytes()):
        if name == "data.tar.xz":
            return lzma.decompress(content)
    raise HostError(f"{package}: no data.tar.xz in it", hint=f"delete {package}, then run again")


def _members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    start = len(_AR_MAGIC)
    while archive.startswith(_AR_MAGIC) and start + _AR_HEADER_BYTES <= len(archive):
        header = archive[start : start + _AR_HEADER_BYTES]
        start += _AR_HEADER_BYTES
        size = int(header[48:58])
        yield header[:16].decode().rstrip(" /"), archive[start : start + size]
        start += size + size % 2


def _lay_out(root: Path) -> None:
    """The names by which compilers and Debian's linker scripts go, and what the compiler's own package would hold."""
    library = root / "usr" / "lib"
    for folder in (library, root / "usr" / "include"):
        (folder / _TRIPLET).symlink_to(".")
    (root / "usr" / "lib64").symlink_to("lib")
    for name in ("lib", "lib64"):
        (root / name).symlink_to("usr/lib")
    (library / "libstdc++.so").symlink_to(LIBRARIES[0])
    (library / "libgcc_s.so").write_text(f"GROUP ( {LIBRARIES[1]} -lgcc )\n", encoding="utf-8")
