"""Room on a disk, asked before it is needed."""

import shutil
from pathlib import Path

from toolchain.errors import HostError
from toolchain.reporter import Reporter, Silent


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(
    folder: Path,
    needed: int,
    what: str,
    *,
    hint: str = "free some space, then run again",
    report: Reporter | None = None,
) -> None:
    """Raise HostError when the disk of `folder` has less than `needed` bytes free for `what`; else tell `report`."""
    free = free_bytes(folder)
    if free < needed:
        raise HostError(f"{folder}: {free / 2**20:.0f} MiB free, {what} needs {needed / 2**20:.0f} MiB", hint=hint)
    (report or Silent()).line(f"{what} needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free")
