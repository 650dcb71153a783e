"""What memory the control groups of this process grant, in version 1 or 2: its own one and each one above it counts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .cores import CGROUPS, groups
from .facts import FactError, Files, parse_int

_UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of a page, which differs from kernel to kernel."""


@dataclass(frozen=True)
class Memory:
    """Of the group that has the least room."""

    limit_bytes: int
    room_bytes: int
    """What it may still take: the limit less what is used, not counting pages of files that are given up at once."""


def memory(files: Files) -> Memory | None:
    """None when no group has a limit. Raises FactError."""
    found = []
    for version_1, folder, limit in _limits(files):
        name = "memory.usage_in_bytes" if version_1 else "memory.current"
        used = files.number(f"{folder}/{name}")
        if used is None:
            raise FactError(f"{folder} has a limit of {limit >> 20} MiB, and no {name}")
        statistics = files.read(f"{folder}/memory.stat") or ""
        key = "total_inactive_file" if version_1 else "inactive_file"
        match = re.search(rf"^{key} (\d+)$", statistics, re.MULTILINE)
        found.append(Memory(limit, limit - used + (int(match[1]) if match else 0)))
    return min(found, key=lambda group: group.room_bytes, default=None)


def memory_limit_bytes(files: Files) -> int | None:
    """The least limit, whatever is used; None when no group has one. Raises FactError."""
    return min((limit for _, _, limit in _limits(files)), default=None)


def _limits(files: Files) -> Iterator[tuple[bool, str, int]]:
    """Whether it is version 1, folder and limit of each group that has one. Raises FactError."""
    version_1, folders = groups(files, "memory")
    name = "memory.limit_in_bytes" if version_1 else "memory.max"
    for folder in folders:
        text = files.read(f"{folder}/{name}")
        if text is None or text == "max":
            continue
        limit = parse_int(text, f"{folder}/{name}")
        if limit < _UNLIMITED_BYTES:
            yield version_1, folder, limit


def memory_enabled(files: Files) -> bool:
    """Whether the kernel can limit a group's memory at all. Raises FactError."""
    controllers = files.read(f"{CGROUPS}/cgroup.controllers")
    if controllers is not None and "memory" in controllers.split():
        return True
    listed = files.read("/proc/cgroups")
    if controllers is None and listed is None:
        raise FactError(f"neither {CGROUPS}/cgroup.controllers nor /proc/cgroups is there")
    # Kernels from 6.15 on may leave out of /proc/cgroups what version 1 does not have: absent there is no proof alone.
    return re.search(r"^memory\s+\d+\s+\d+\s+1$", listed or "", re.MULTILINE) is not None
