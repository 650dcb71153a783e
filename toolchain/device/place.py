"""Put a folder in its place whole, flushed, or not at all: filled beside it under another name, then renamed."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BusyError, DeviceError

_STAGING = ".{}.unpacking"
_FOLDER_MODE = 0o755


def check_room(into: Path, manifest: dict[str, Any]) -> None:
    """The disk of `into` has room for a bundle's files. Raises DeviceError."""
    disk = os.statvfs(into)
    free, needed = disk.f_bavail * disk.f_frsize, sum(int(facts["bytes"]) for facts in manifest["files"].values())
    if free < needed:
        raise DeviceError(
            f"{into}: {free >> 20} MiB free, the bundle needs {needed / 2**20:.0f} MiB: nothing was unpacked",
            hint="free some space, or unpack into a folder on another disk",
        )


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final`, for this process alone, which becomes `final` when the block ends well.

    What a killed process left there is cleared away. Raises BusyError when another one is at it.
    """
    staged = final.parent / _STAGING.format(final.name)
    staged.mkdir(mode=0o700, exist_ok=True)
    handle = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{final.name} is being unpacked into {final.parent} by another process", hint="wait for it"
            ) from None
        try:
            for left in staged.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield staged
            _sync_folders(staged)
            staged.rename(final)
            sync(final.parent)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def leftovers(into: Path) -> list[Path]:
    """Folders that killed processes have left half filled."""
    return [path for path in into.glob(_STAGING.format("*")) if path.is_dir() and not path.is_symlink()]


def write(path: Path, mode: int, blocks: Iterator[bytes]) -> None:
    """A new file, whole on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as out:
        for block in blocks:
            out.write(block)
        out.flush()
        os.fchmod(handle, mode)
        os.fsync(handle)


def draft(path: Path) -> Path:
    """What `path` is called until it is whole."""
    return path.with_name(f".{path.name}.new")


def replace(path: Path, text: str, mode: int = 0o644) -> None:
    """A small file's new content, whole or not at all."""
    new = draft(path)
    new.unlink(missing_ok=True)
    try:
        write(new, mode, iter([text.encode()]))
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def replace_json(path: Path, content: object) -> None:
    replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def point(link: Path, target: str) -> None:
    """Make `link` lead to `target`, relative to it, in one step: whoever looks sees the old one or the new one."""
    new = draft(link)
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.rename(link)
    sync(link.parent)


def sync(path: Path) -> None:
    """A folder's entries are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folders(root: Path) -> None:
    """Folders for everyone to read whatever the umask is, and on the disk."""
    for folder, _, _ in os.walk(root, topdown=False):
        Path(folder).chmod(_FOLDER_MODE)
        sync(Path(folder))
