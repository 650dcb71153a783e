"""What this board is, and in which state, right now: read from /proc and /sys. A fact that is not there is None."""

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from . import cgroup
from .cores import CPUS, cpu_quota, physical_cores, usable_cpus
from .errors import DeviceError
from .facts import FactError, parse_int
from .system import HERE, System

_FIRMWARE_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
"""Of the mask that a Raspberry Pi's firmware keeps: now; the same ones since boot are 16 bits higher."""
_COOLS_BY_CLOCK = re.compile(r"cpu|gpu|processor|devfreq|throttle|powerclamp", re.IGNORECASE)
"""Cooling devices that take speed away; a fan that turns, or a warning that the case is hot, does not."""

_L4T_RELEASE = "/etc/nv_tegra_release"

_T = TypeVar("_T")
Throttling = dict[str, list[str] | None]
"""{"now": [reasons], "since_boot": [reasons]}; None for the one of them that nothing here tells."""


def _text(path: str | Path) -> str | None:
    return HERE.text(str(path))


def _or_none(read: Callable[[System], _T], system: System) -> _T | None:
    try:
        return read(system)
    except FactError:
        return None


def board(system: System = HERE) -> str | None:
    """The board's name from the device tree (ARM) or DMI (x86)."""
    tree = system.text("/proc/device-tree/model")
    if tree:
        return tree
    parts = [system.text(f"/sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name")]
    return " ".join(part for part in parts if part) or None


def is_jetson(system: System = HERE) -> bool:
    """By the device tree, which a container sees too, or by the release file."""
    compatible = system.text("/proc/device-tree/compatible") or ""
    return "nvidia,tegra" in compatible or system.exists(_L4T_RELEASE)


def cpu_model() -> str | None:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return None


def memory_bytes() -> int:
    """Memory of the machine, or of the container. Raises DeviceError where /proc is missing.

    The same for a service with a limit of its own and for whoever installed it: `tune` knows the machine by it.
    """
    total = _meminfo("MemTotal", HERE)
    limit = _text("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit and limit.isdigit() else total


def memory_granted_bytes(system: System = HERE) -> int:
    """The most that this process can ever have: the machine's memory, or the least limit of its control groups.

    Raises DeviceError where /proc is missing. Of groups that cannot be read doctor tells.
    """
    total = _meminfo("MemTotal", system)
    limit = _or_none(cgroup.memory_limit_bytes, system)
    return total if limit is None else min(total, limit)


def memory_available_bytes() -> int:
    """What programs could still take without swapping, as the kernel reckons."""
    return _meminfo("MemAvailable", HERE)


def _meminfo(key: str, system: System) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", system.text("/proc/meminfo") or "", re.MULTILINE)
    if match is None:
        raise DeviceError(f"/proc/meminfo has no {key}", hint="mount -t proc proc /proc")
    return int(match[1]) * 1024


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
    return _text(f"{CPUS}/cpu{usable_cpus()[0]}/cpufreq/scaling_governor")


def _frequencies_hz() -> list[int]:
    """Clock of each usable processor now, where the kernel says."""
    found = [_text(f"{CPUS}/cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in usable_cpus()]
    return [int(khz) * 1000 for khz in found if khz and khz.isdigit()]


def temperatures_c() -> dict[str, float]:
    """Thermal zones in degrees Celsius, where there are any."""
    zones: dict[str, float] = {}
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        value = _text(zone / "temp")
        if value and value.lstrip("-").isdigit():
            zones[f"{zone.name} {_text(zone / 'type') or ''}".strip()] = int(value) / 1000
    return zones


def throttling(system: System = HERE) -> Throttling | None:
    """As `read_throttling`; None when nothing tells, or nothing that can be understood."""
    found = _or_none(read_throttling, system)
    return None if found is None or found == {"now": None, "since_boot": None} else found


def read_throttling(system: System) -> Throttling:
    """What lowers the clock now, and has done so since boot. Raises FactError for an answer not to be had.

    Sources: a Raspberry Pi's firmware (both), the kernel's cooling devices (now), x86's counters (since boot).
    """
    now, since_boot = _firmware(system) or (None, None)
    cooling, counted = _cooling(system), _counted(system)
    return {"now": _joined(now, cooling), "since_boot": _joined(since_boot, counted)}


def _joined(*found: list[str] | None) -> list[str] | None:
    told = [part for part in found if part is not None]
    return [reason for part in told for reason in part] if told else None


def _firmware(system: System) -> tuple[list[str], list[str]] | None:
    """(now, since boot) as a Raspberry Pi's firmware has it; None on another board."""
    source = "vcgencmd get_throttled"
    said = system.run(["vcgencmd", "get_throttled"])
    if said is None:
        for source in system.glob("/sys/devices/platform/soc*/soc*:firmware/get_throttled"):
            said = system.read(source)
    if said is None:
        if "Raspberry Pi" in (board(system) or ""):
            raise FactError(
                "the firmware does not say: vcgencmd does not answer, and /sys has no get_throttled",
                remedy="let this user run vcgencmd: sudo usermod -aG video USER",
            )
        return None
    match = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-f]{1,8})", said.strip(), re.IGNORECASE)
    if match is None:
        raise FactError(f"{source} says {said.strip()[:60]!r}, which is no mask")
    mask = int(match[1], 16)
    now, since_boot = ([name for bit, name in _FIRMWARE_BITS.items() if mask >> shift + bit & 1] for shift in (0, 16))
    return now, since_boot


def _cooling(system: System) -> list[str] | None:
    """Cooling devices that hold the clock down now; None when the kernel has none of that kind."""
    found, reasons = False, []
    for folder in system.glob("/sys/class/thermal/cooling_device*"):
        kind = system.read(f"{folder}/type") or ""
        if not _COOLS_BY_CLOCK.search(kind) or "fan" in kind.lower():
            continue
        found = True
        state = system.number(f"{folder}/cur_state")
        if state is None:
            raise FactError(f"{folder} ({kind}) has no cur_state")
        if state > 0:
            reasons.append(f"{kind} at {state} of {system.text(f'{folder}/max_state') or '?'}")
    return reasons if found else None


def _counted(system: System) -> list[str] | None:
    """Times that x86 cores were too hot since boot; None where they are not counted."""
    paths = system.glob(f"{CPUS}/cpu[0-9]*/thermal_throttle/core_throttle_count")
    times = sum(parse_int(system.read(path) or "", path) for path in paths)
    return None if not paths else [f"cores too hot, {times} times"] if times else []


def power_mode(system: System = HERE) -> str | None:
    """A Jetson's power mode by name, such as "15W" or "MAXN_SUPER"."""
    return _or_none(read_power_mode, system)


def read_power_mode(system: System) -> str:
    """Raises FactError, also on what is no Jetson."""
    said = system.run(["nvpmodel", "-q"])
    if said is None:
        raise FactError("nvpmodel -q does not answer", remedy="sudo nvpmodel -q; in a container: ask outside of it")
    match = re.search(r"^NV Power Mode\s*:\s*(\S.*?)\s*$", said, re.MULTILINE)
    if match is None:
        raise FactError(f"nvpmodel -q says {said.strip()[:60]!r}, which names no power mode")
    return match[1]


def l4t(system: System = HERE) -> str | None:
    """Release of a Jetson's Linux, such as "36.4.3"."""
    return _or_none(read_l4t, system)


def read_l4t(system: System) -> str:
    """Raises FactError, also on what is no Jetson."""
    text = system.read(_L4T_RELEASE)
    if text is None:
        raise FactError(
            f"no {_L4T_RELEASE}: a container that was not given it?",
            remedy=f"docker run -v {_L4T_RELEASE}:{_L4T_RELEASE}:ro",
        )
    match = re.match(r"# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    if match is None:
        raise FactError(f"{_L4T_RELEASE} says {text[:60]!r}, which is no release")
    return f"{match[1]}.{match[2]}"


def gpus(system: System = HERE) -> list[str]:
    """NVIDIA's graphics cards by name. A Jetson's GPU is not among them: its board says which one it is."""
    found = [system.text(path) or "" for path in system.glob("/proc/driver/nvidia/gpus/*/information")]
    return [name[1] for text in found if (name := re.search(r"^Model:\s*(\S.*?)\s*$", text, re.MULTILINE))]


def gpu_driver(system: System = HERE) -> str | None:
    """Version of NVIDIA's kernel module, such as "580.65.06"."""
    match = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", system.text("/proc/driver/nvidia/version") or "")
    return match[0] if match else None


def probe() -> dict[str, Any]:
    """Everything above, JSON-able. Bytes, hertz, degrees Celsius."""
    version = glibc()
    return {
        "board": board(),
        "cpu": cpu_model(),
        "arch": platform.machine(),
        "logical_cpus": len(usable_cpus()),
        "physical_cores": physical_cores(),
        "cpu_quota": _or_none(cpu_quota, HERE),
        "memory_bytes": memory_bytes(),
        "memory_available_bytes": memory_available_bytes(),
        "kernel": platform.release(),
        "glibc": ".".join(map(str, version)) if version else None,
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
        "l4t": l4t(),
        "gpus": gpus(),
        "gpu_driver": gpu_driver(),
        **state(),
    }


def state() -> dict[str, Any]:
    """What of it changes while we measure."""
    return {
        "governor": _governor(),
        "power_mode": power_mode(),
        "throttling": throttling(),
        "frequencies_hz": _frequencies_hz(),
        "temperatures_c": temperatures_c(),
        "load_average_1min": os.getloadavg()[0],
    }
