"""A base for images of bundles, from Debian's packages: glibc and Python, no shell, no package manager, no registry.

For a GPU with CUDA 13 on aarch64, NVIDIA's libraries from its wheels are in it as well.
"""

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
from toolchain.gguf import cuda_toolkit, llama_cpp
from toolchain.reporter import Reporter
from toolchain.resources import resource
from toolchain.target import TargetProfile

NAME = "toolchain-base"
_BYTES = 70 << 20
_CUDA_BYTES = 670 << 20
CUDA_ENV = ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
"""What the container toolkit goes by, which puts the driver's own libraries into a container."""
_DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}


def make(
    out: Path, *, arch: str, report: Reporter, target: TargetProfile | None = None, force: bool = False
) -> dict[str, Any]:
    """Write the base for `arch` to the file `out`, as `docker load` and `toolchain pack` read it; digest and bytes.

    With the libraries that the programs for a `target` want of their device. Raises HostError where Debian's tools or
    room are missing and for libraries that cannot be had so, ExternalToolError when packages or wheels cannot be had.
    """
    libraries = target.runtime.device_libraries if target is not None else ()
    if target is not None and not _can_be_made(target):
        raise HostError(
            f"no base with {', '.join(libraries)} for {arch} can be made of packages", hint=how(target, out=out)
        )
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise HostError(
                f"no {program} on this machine: the base is made of Debian's packages",
                hint="give `toolchain pack` another --base, such as of `docker save debian:bookworm-slim` with python3",
            )
    platform = image.platform(arch)
    with tempfile.TemporaryDirectory(prefix="toolchain-base-") as folder:
        root = Path(folder, "base")
        size_guess = _BYTES + (_CUDA_BYTES if libraries else 0)
        require_free(root.parent, _BYTES + size_guess, "the base's packages")
        # Entered first: where it cannot be written is told before anything is fetched.
        with archive.finished(out, root, size_guess, force=force) as file:
            log = Path(folder, "log")
            argv = ["sh", str(resource("docker/minimal-base.sh")), _DEBIAN[arch], str(root)]
            argv += ["libstdc++6"] if libraries else []  # of libcudart
            process.run(argv, log=log, hint="Debian's package servers must be reachable, see apt-get update")
            packages = sorted(path.name for path in (root / "var/lib/dpkg/status.d").iterdir())
            if libraries:
                _add_cuda(root, report)
            layout = image.Layout(file)
            layer = layout.blob(lambda write: _write_tree(root, write), PLAIN_LAYER)
            config = {
                "created": image.CREATED,
                **platform,
                "config": {
                    "Env": ["PATH=/usr/sbin:/usr/bin", *(CUDA_ENV if libraries else ())],
                    "User": image.USER,
                    "WorkingDir": "/",
                },
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}"]},
                "history": [{"created": image.CREATED, "created_by": "toolchain base"}],
            }
            digest, size = image.finish(layout, [layer], config, platform, name=f"{NAME}:{arch}", annotations={})
    report.line(f"{out}: {size / 2**20:.1f} MiB, {len(packages)} packages of Debian, sha256:{digest[:12]}…")
    return {"digest": digest, "bytes": size, "packages": packages}


def _add_cuda(root: Path, report: Reporter) -> None:
    """NVIDIA's libraries where the loader looks for them, and their licences where Debian's packages have theirs."""
    folder = cuda_toolkit.device_folder(llama_cpp.cache_folder(), report=report)
    for path in sorted((folder / "lib").iterdir()):
        shutil.copyfile(path, root / "usr/lib/aarch64-linux-gnu" / path.name)
    for path in sorted((folder / "licences").iterdir()):
        place = root / "usr/share/doc" / path.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / "copyright")


def _can_be_made(target: TargetProfile) -> bool:
    libraries = target.runtime.device_libraries
    return not libraries or (target.arch == "aarch64" and cuda_toolkit.device_libraries().issuperset(libraries))


def how(target: TargetProfile, *, out: Path) -> str:
    """What makes a base for a target's images: ours, or by an engine the image that its profile names, and Python."""
    if _can_be_made(target):
        what = f"--target {target.name}" if target.runtime.device_libraries else f"--arch {target.arch}"
        return f"toolchain base {what} --out {out}"
    if target.image.reference is None:
        return "give the profile an image that has them: image.base"
    platform = f"linux/{image.platform(target.arch)['architecture']}"
    return (
        f"docker build -f docker/runtime.Dockerfile --target device --platform {platform} --build-arg "
        f"BASE={target.image.reference} -t base . && docker save -o {out} base"
    )


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
