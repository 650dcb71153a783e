"""Processors that this process may use, by affinity, topology and control groups. Loaded before the server's spawn."""

from __future__ import annotations

import os

from .facts import FactError, Files

CPUS = "/sys/devices/system/cpu"
CGROUPS = "/sys/fs/cgroup"


def usable_cpus() -> list[int]:
    """Logical processors that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def physical_cores() -> int:
    """Physical cores that this process may use: hyper-threads of one core count once, and a quota is kept."""
    files = Files()
    cores = set()
    for cpu in usable_cpus():
        package = files.text(f"{CPUS}/cpu{cpu}/topology/physical_package_id")
        core = files.text(f"{CPUS}/cpu{cpu}/topology/core_id")
        cores.add((package, core) if core is not None else ("cpu", str(cpu)))
    try:
        quota = cpu_quota(files)
    except FactError:
        quota = None
    return len(cores) if quota is None else max(1, min(len(cores), int(quota)))


def cpu_quota(files: Files) -> float | None:
    """Processors' worth of time that the control groups grant; None without a limit. Raises FactError."""
    version_1, folders = groups(files, "cpu")
    quotas = [_quota_1(files, folder) if version_1 else _quota_2(files, folder) for folder in folders]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_1(files: Files, folder: str) -> float | None:
    quota, period = (files.number(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period"))
    return None if quota is None or not period or quota < 0 else quota / period


def _quota_2(files: Files, folder: str) -> float | None:
    path = f"{folder}/cpu.max"
    text = files.read(path)
    if text is None or text.startswith("max"):
        return None
    quota, _, period = text.partition(" ")
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        raise FactError(f"{path} says {text[:60]!r}, which is no quota")
    return int(quota) / int(period)


def groups(files: Files, controller: str) -> tuple[bool, list[str]]:
    """Whether `controller` is of version 1, and the folders of this process's group and of those above it.

    A container often sees its own group as the top one, whatever /proc/self/cgroup calls it: folders need not exist.
    """
    place: dict[str, str] = {}
    for line in (files.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        place.update(dict.fromkeys(controllers.split(","), path))
    version_1 = controller in place if place else files.exists(f"{CGROUPS}/{controller}")
    top = f"{CGROUPS}/{controller}" if version_1 else CGROUPS
    own = place.get(controller if version_1 else "") or "/"
    parts = [part for part in own.split("/") if part not in ("", ".")]
    if not own.startswith("/") or ".." in parts:
        parts = []
    return version_1, ["/".join([top, *parts[:depth]]) for depth in range(len(parts), -1, -1)]
