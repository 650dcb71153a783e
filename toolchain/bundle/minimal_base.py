"""A base for images of bundles, from Debian's packages: glibc and Python, no shell, no package manager, no registry."""

import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain import process
from toolchain.bundle import archive, image
from toolchain.bundle.base_image import PLAIN_LAYER
from toolchain.disk import require_free
from toolchain.errors import HostError
from toolchain.reporter import Reporter
from toolchain.resources import resource

NAME = "toolchain-base"
_BYTES = 70 << 20
_DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}


def make(out: Path, *, arch: str, report: Reporter, force: bool = False) -> dict[str, Any]:
    """Write the base for `arch` to the file `out`, as `docker load` and `toolchain pack` read it; digest and bytes.

    Raises HostError where Debian's tools or room are missing, ExternalToolError when packages cannot be had.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise HostError(
                f"no {program} on this machine: the base is made of Debian's packages",
                hint="give `toolchain pack` another --base, such as of `docker save debian:bookworm-slim` with python3",
            )
    platform = image.platform(arch)
    with tempfile.TemporaryDirectory(prefix="toolchain-base-") as folder:
        root = Path(folder, "root")
        require_free(root.parent, 2 * _BYTES, "the base's packages")
        log = Path(folder, "log")
        argv = ["sh", str(resource("docker/minimal-base.sh")), _DEBIAN[arch], str(root)]
        process.run(argv, log=log, hint="Debian's package servers must be reachable, see apt-get update")
        packages = sorted(path.name for path in (root / "var/lib/dpkg/status.d").iterdir())
        with archive.finished(out, root, _BYTES, force=force) as file:
            layout = image.Layout(file)
            layer = layout.blob(lambda write: _write_tree(root, write), PLAIN_LAYER)
            config = {
                "created": image.CREATED,
                **platform,
                "config": {"Env": ["PATH=/usr/sbin:/usr/bin"], "User": image.USER, "WorkingDir": "/"},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}"]},
                "history": [{"created": image.CREATED, "created_by": "toolchain base"}],
            }
            digest, size = image.finish(layout, [layer], config, platform, name=f"{NAME}:{arch}", annotations={})
    report.line(f"{out}: {size / 2**20:.1f} MiB, {len(packages)} packages of Debian, sha256:{digest[:12]}…")
    return {"digest": digest, "bytes": size, "packages": packages}


class _Sink:
    """What tarfile writes to."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def write(self, block: bytes) -> int:
        self._write(bytes(block))
        return len(block)


def _write_tree(root: Path, write: Callable[[bytes], None]) -> None:
    """All of `root` as a tar: the same tree gives the same bytes, whose files they are on this host notwithstanding."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime = 0
        return member

    with tarfile.open(fileobj=_Sink(write), mode="w|", format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for folder, folders, files in os.walk(root):
            folders.sort()
            for name in sorted([*files, *folders]):
                path = Path(folder, name)
                if path.is_symlink() and name in folders:
                    folders.remove(name)
                tar.add(path, str(path.relative_to(root)), recursive=False, filter=plain)
