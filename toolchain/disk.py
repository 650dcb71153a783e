"""Room on a disk, asked before it is needed."""

import shutil
from pathlib import Path

from toolchain.errors import HostError


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, which need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(folder: Path, needed: int, what: str, *, hint: str = "free some space, then run again") -> None:
    """Raise HostError when the disk of `folder` has less than `needed` bytes free for `what`."""
    free = free_bytes(folder)
    if free < needed:
        raise HostError(f"{folder}: {free / 2**20:.0f} MiB free, {what} needs {needed / 2**20:.0f} MiB", hint=hint)
