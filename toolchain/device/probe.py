"""What this board is, and in which state, right now: read from /proc and /sys. A fact that is not there is None."""

import os
import platform
import re
from pathlib import Path
from typing import Any

_CPUS = Path("/sys/devices/system/cpu")


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def board() -> str | None:
    """The board's name from the device tree (ARM) or DMI (x86)."""
    tree = _text("/proc/device-tree/model")
    if tree:
        return tree
    parts = [_text(f"/sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name")]
    return " ".join(part for part in parts if part) or None


def cpu_model() -> str | None:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return None


def usable_cpus() -> list[int]:
    """Logical processors that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def cpu_quota() -> float | None:
    """Processors' worth of time that the control group grants; None without a limit."""
    limit = (_text("/sys/fs/cgroup/cpu.max") or "max").split()
    return None if limit[0] == "max" else int(limit[0]) / int(limit[1])


def physical_cores() -> int:
    """Physical cores that this process may use: hyper-threads of one core count once, and a quota is kept."""
    cores = set()
    for cpu in usable_cpus():
        package = _text(_CPUS / f"cpu{cpu}/topology/physical_package_id")
        core = _text(_CPUS / f"cpu{cpu}/topology/core_id")
        cores.add((package, core) if core is not None else ("cpu", str(cpu)))
    quota = cpu_quota()
    return len(cores) if quota is None else max(1, min(len(cores), int(quota)))


def memory_bytes() -> int:
    """Memory of the machine, or of the control group when that is less."""
    total = _meminfo("MemTotal")
    limit = _text("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit and limit.isdigit() else total


def _meminfo(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", _text("/proc/meminfo") or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def glibc() -> tuple[int, int] | None:
    """Version of the C library that Python runs on; None when it is not glibc."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return None
    major, _, minor = version.partition(".")
    return (int(major), int(minor.partition(".")[0])) if name == "glibc" else None


def emulated(arch: str) -> str | None:
    """Why figures of programs for `arch` are not this machine's own: the sign of emulation found, or None."""
    kernel = _text("/proc/sys/kernel/arch") or platform.machine()
    if kernel != arch:
        return f"the kernel runs on {kernel}, the programs are for {arch}"
    cpuinfo = _text("/proc/cpuinfo") or ""
    if arch == "aarch64" and "vendor_id" in cpuinfo:
        return "/proc/cpuinfo describes an x86 processor"
    if "QEMU TCG" in cpuinfo:
        return "/proc/cpuinfo names QEMU's emulated processor"
    return None


def _governor() -> str | None:
    return _text(_CPUS / f"cpu{usable_cpus()[0]}/cpufreq/scaling_governor")


def _frequencies_hz() -> list[int]:
    """Clock of each usable processor now, where the kernel says."""
    found = [_text(_CPUS / f"cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in usable_cpus()]
    return [int(khz) * 1000 for khz in found if khz and khz.isdigit()]


def temperatures_c() -> dict[str, float]:
    """Thermal zones in degrees Celsius, where there are any."""
    zones: dict[str, float] = {}
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        value = _text(zone / "temp")
        if value and value.lstrip("-").isdigit():
            zones[f"{zone.name} {_text(zone / 'type') or ''}".strip()] = int(value) / 1000
    return zones


def probe() -> dict[str, Any]:
    """Everything above, JSON-able. Bytes, hertz, degrees Celsius."""
    version = glibc()
    return {
        "board": board(),
        "cpu": cpu_model(),
        "arch": platform.machine(),
        "logical_cpus": len(usable_cpus()),
        "physical_cores": physical_cores(),
        "cpu_quota": cpu_quota(),
        "memory_bytes": memory_bytes(),
        "memory_available_bytes": _meminfo("MemAvailable"),
        "kernel": platform.release(),
        "glibc": ".".join(map(str, version)) if version else None,
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "governor": _governor(),
        "frequencies_hz": _frequencies_hz(),
        "temperatures_c": temperatures_c(),
        "load_average_1min": os.getloadavg()[0],
    }
