"""An older system's libraries to build against, put together from packages, and how pinned files are fetched."""

import hashlib
import io
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.lines import Lines
from toolchain.errors import ExternalToolError, HostError
from toolchain.gguf import pinned, sysroot
from toolchain.reporter import Silent

FILES = {
    "usr/include/stdio.h": "c",
    "usr/include/x86_64-linux-gnu/bits/types.h": "bits of c",
    "usr/include/c++/10/bits/stl.h": "bits of c++",
    "usr/include/x86_64-linux-gnu/c++/10/bits/stl.h": "bits of c++ for the processor",
    "lib/x86_64-linux-gnu/libc-2.31.so": "the library",
    "usr/lib/x86_64-linux-gnu/crt1.o": "start",
    "usr/lib/x86_64-linux-gnu/gconv/KOI8-R.so": "not for linking",
    "usr/lib/gcc/x86_64-linux-gnu/10/libstdc++.a": "not for linking",
    "usr/share/doc/libc6/copyright": "not for linking",
}
LINKS = {
    "lib/x86_64-linux-gnu/libc.so.6": "libc-2.31.so",
    "lib64/ld-linux-x86-64.so.2": "/lib/x86_64-linux-gnu/ld-2.31.so",
}


def deb(path: Path) -> str:
    """A Debian package of FILES and LINKS; its SHA-256."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, text in FILES.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        for name, target in LINKS.items():
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    content = b"!<arch>\n"
    for name, part in (("debian-binary", b"2.0"), ("data.tar.xz", lzma.compress(data.getvalue()))):
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    digest = deb(tmp_path / "mirror" / "pool" / "libc6.deb")
    package = {"name": "libc6", "version": "2.31", "file": "pool/libc6.deb", "sha256": digest}
    mirrors = [(tmp_path / name).as_uri() for name in ("gone", "mirror")]
    pins: dict[str, Any] = {"mirrors": mirrors, "packages": [package]}
    monkeypatch.setattr(sysroot, "_pins", lambda: pins)
    return tmp_path / "mirror"


def test_headers_and_libraries_lie_where_any_compiler_looks(mirror: Path, tmp_path: Path) -> None:
    made = sysroot.make(tmp_path / "cache", report=Silent())
    for folder in ("lib", "lib64", "usr/lib", "usr/lib64", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"):
        assert (made / folder / "libc.so.6").read_text() == "the library"
    assert (made / "usr/lib/ld-linux-x86-64.so.2").readlink() == Path("ld-2.31.so")
    for folder in ("usr/include", "usr/include/x86_64-linux-gnu"):
        assert (made / folder / "stdio.h").read_text() == "c"
        assert (made / folder / "bits/types.h").read_text() == "bits of c"
    own, for_processor, _ = sysroot.compiler_flags(made).removeprefix("-nostdinc++ -isystem ").split(" -isystem ")
    assert (Path(own) / "bits/stl.h").read_text() == "bits of c++"
    assert (Path(for_processor) / "bits/stl.h").read_text() == "bits of c++ for the processor"
    texts = {path.read_text() for path in made.rglob("*") if path.is_file() and not path.is_symlink()}
    assert "not for linking" not in texts
    assert "GROUP ( libgcc_s.so.1 -lgcc )\n" in texts
    (mirror / "pool" / "libc6.deb").unlink()
    assert sysroot.make(tmp_path / "cache", report=Silent()) == made


def test_a_mirror_that_gives_another_file_is_not_believed(mirror: Path, tmp_path: Path) -> None:
    (mirror / "pool" / "libc6.deb").write_bytes(b"another")
    with pytest.raises(ExternalToolError, match=r"gone/pool/libc6.deb: .*No such file.*SHA-256 is") as caught:
        sysroot.make(tmp_path / "cache", report=Silent())
    by_hand = tmp_path / "cache" / "downloads" / "libc6.deb"
    assert caught.value.hint == f"a mirror must be reachable, or put the file there yourself: {by_hand}"
    assert not list(by_hand.parent.iterdir())


def test_a_file_that_was_put_there_by_hand_is_checked_as_well(mirror: Path, tmp_path: Path) -> None:
    by_hand = tmp_path / "cache" / "downloads" / "libc6.deb"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"another")
    with pytest.raises(HostError, match="SHA-256 is") as caught:
        sysroot.make(tmp_path / "cache", report=Silent())
    assert caught.value.hint == f"delete {by_hand}, then run again"


def test_a_package_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(b"!<arch>\n")
    with pytest.raises(HostError, match=r"a.deb: no data.tar.xz in it"):
        sysroot._unpack(path, tmp_path / "out")


def test_a_lock_that_was_let_go_is_taken_without_a_word(tmp_path: Path) -> None:
    reporter = Lines()
    with pinned.lock(tmp_path / "lock", Silent(), doing="making it"):
        pass
    with pinned.lock(tmp_path / "lock", reporter, doing="making it"):
        assert reporter.lines == []
