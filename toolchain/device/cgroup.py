"""What the control groups of this process grant, in version 1 or 2: its own group and each one above it counts."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from .system import FactError, System, parse_int

_TOP = "/sys/fs/cgroup"
_UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of a page, which differs from kernel to kernel."""


@dataclass(frozen=True)
class Memory:
    """Of the group that has the least room."""

    limit_bytes: int
    room_bytes: int
    """What it may still take: the limit less what is used, not counting pages of files that are given up at once."""


def memory(system: System) -> Memory | None:
    """None when no group has a limit. Raises FactError."""
    version_1, folders = _groups(system, "memory")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version_1 else ("memory.max", "memory.current")
    found = []
    for folder in folders:
        text = system.read(f"{folder}/{names[0]}")
        if text is None or text == "max":
            continue
        limit = parse_int(text, f"{folder}/{names[0]}")
        if limit >= _UNLIMITED_BYTES:
            continue
        used = system.number(f"{folder}/{names[1]}")
        if used is None:
            raise FactError(f"{folder} has a limit of {limit >> 20} MiB, and no {names[1]}")
        statistics = system.read(f"{folder}/memory.stat") or ""
        key = "total_inactive_file" if version_1 else "inactive_file"
        match = re.search(rf"^{key} (\d+)$", statistics, re.MULTILINE)
        found.append(Memory(limit, limit - used + (int(match[1]) if match else 0)))
    return min(found, key=lambda group: group.room_bytes, default=None)


def memory_enabled(system: System) -> bool:
    """Whether the kernel can limit a group's memory at all. Raises FactError."""
    controllers = system.read(f"{_TOP}/cgroup.controllers")
    if controllers is not None and "memory" in controllers.split():
        return True
    listed = system.read("/proc/cgroups")
    if controllers is None and listed is None:
        raise FactError(f"neither {_TOP}/cgroup.controllers nor /proc/cgroups is there")
    # Kernels from 6.15 on may leave out of /proc/cgroups what version 1 does not have: absent there is no proof alone.
    return re.search(r"^memory\s+\d+\s+\d+\s+1$", listed or "", re.MULTILINE) is not None


def cpu_quota(system: System) -> float | None:
    """Processors' worth of time that the groups grant; None without a limit. Raises FactError."""
    version_1, folders = _groups(system, "cpu")
    quotas = [_quota_1(system, folder) if version_1 else _quota_2(system, folder) for folder in folders]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_1(system: System, folder: str) -> float | None:
    quota, period = (system.number(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period"))
    return None if quota is None or not period or quota < 0 else quota / period


def _quota_2(system: System, folder: str) -> float | None:
    path = f"{folder}/cpu.max"
    text = system.read(path)
    if text is None or text.startswith("max"):
        return None
    match = re.fullmatch(r"(\d+) ([1-9]\d*)", text)
    if match is None:
        raise FactError(f"{path} says {text[:60]!r}, which is no quota")
    return int(match[1]) / int(match[2])


def _groups(system: System, controller: str) -> tuple[bool, list[str]]:
    """Whether `controller` is of version 1, and the folders of this process's group and of those above it.

    A container often sees its own group as the top one, whatever /proc/self/cgroup calls it: folders need not exist.
    """
    place: dict[str, str] = {}
    for line in (system.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        place.update(dict.fromkeys(controllers.split(","), path))
    version_1 = controller in place if place else system.exists(f"{_TOP}/{controller}")
    top = f"{_TOP}/{controller}" if version_1 else _TOP
    own = PurePosixPath(place.get(controller if version_1 else "") or "/")
    inside = [own, *own.parents] if own.is_absolute() and ".." not in own.parts else [PurePosixPath("/")]
    return version_1, [f"{top}{path}".rstrip("/") for path in inside]
