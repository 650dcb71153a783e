"""Is this machine fit for this bundle right now, and in which state? Findings, each with a remedy where there is one.

A fact that should be there and cannot be read is "unknown" with the reason, never a guess. Only "fail" keeps the
bundle from running; "warn" makes it slower, or its figures worth less.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from . import cgroup, cores, meter, probe, processor, serve, verify
from .errors import DeviceError
from .facts import FactError
from .files import Bundle
from .system import HERE, System

Level = Literal["ok", "warn", "fail", "unknown"]
Verdict = tuple[Level, str, str | None]
"""Level, detail, remedy."""
Look = Callable[[Bundle, System], Verdict]
SCHEMA_VERSION = 1

_SWAP_BYTES = 64 << 20
"""Used swap below this is what a kernel puts away of idle programs at any time."""
_FIRST_YEAR = 2024
"""No bundle is older: a clock before it was never set."""
_BAD_L4T = {"36.4.7": "large allocations on the GPU fail (llama.cpp#23732)"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    detail: str
    remedy: str | None = None

    def as_line(self, width: int) -> str:
        mark = "FAIL" if self.level == "fail" else self.level
        remedy = f"\n{'':9}→ {self.remedy}" if self.remedy else ""
        return f"{mark:<7}  {self.name:<{width}}  {self.detail}{remedy}"


def examine(bundle: Bundle, system: System = HERE) -> list[Finding]:
    """Look at everything; the bundle's own program is started last, if it is to say which GPU it finds."""
    checks = verify.host_checks(bundle, system)
    found = {item["name"]: Finding(item["name"], "ok" if item["ok"] else "fail", item["detail"]) for item in checks}
    looks = dict(_LOOKS)
    if probe.is_jetson(system):
        looks |= _JETSON_LOOKS
        if bundle.manifest["runtime"]["backend"] == "CUDA":
            looks["CUDA"] = _cuda
    looks["backend"] = _backend
    # Of what verify takes for right where it is not known, this says so.
    return list((found | {name: _finding(name, look, bundle, system) for name, look in looks.items()}).values())


def _finding(name: str, look: Look, bundle: Bundle, system: System) -> Finding:
    try:
        return Finding(name, *look(bundle, system))
    except FactError as error:
        return Finding(name, "unknown", error.reason, error.remedy)
    except DeviceError as error:
        return Finding(name, "fail", error.message, error.hint)


def unfit(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "fail" for finding in findings)


def report(bundle_id: str, findings: list[Finding]) -> dict[str, Any]:
    """The findings as a record."""
    return {
        "schema_version": SCHEMA_VERSION,
        "bundle": bundle_id,
        "ok": not unfit(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def table(findings: list[Finding]) -> str:
    """The findings for people, and how many are of which level."""
    width = max(len(finding.name) for finding in findings)
    count = {level: sum(finding.level == level for finding in findings) for level in ("fail", "warn", "unknown", "ok")}
    shown = ", ".join(f"{number} {level}" for level, number in count.items() if number)
    verdict = "not fit for this bundle" if unfit(findings) else "fit for this bundle"
    verdict += ", as far as is known" if count["unknown"] and not unfit(findings) else ""
    return "\n".join([*(finding.as_line(width) for finding in findings), f"{verdict}: {shown}"])


# The processor


def _instruction_set(bundle: Bundle, system: System) -> Verdict:
    needed, missing = processor.needed_and_missing(bundle.manifest, system)
    if missing:
        remedy = "build the bundle for this processor: a target with its own flags (docs/targets.md)"
        return "fail", processor.lacks(needed, missing), remedy
    return "ok", f"{', '.join(needed)}: all that the programs need", None


def _cpu_quota(bundle: Bundle, system: System) -> Verdict:
    quota = cores.cpu_quota(system)
    if quota is None:
        return "ok", "the control group sets none", None
    asked: int | None = bundle.presets()["server"]["threads"]
    detail = f"the control group grants {quota:g} processors"
    if quota < (asked or 1):
        more = f", to {asked} threads" if asked else ", less than one"
        return "warn", detail + more, "raise it (docker --cpus, systemd CPUQuota=): threads wait for each other"
    return "ok", detail, None


def _governor(bundle: Bundle, system: System) -> Verdict:
    paths = system.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    found = sorted({system.read(path) or "nothing" for path in paths})
    if not found:
        raise FactError("the kernel has no cpufreq for these processors, as in a virtual machine")
    if found == ["performance"]:
        return "ok", "performance", None
    remedy = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    return "warn", f"{', '.join(found)}: the clock follows the load, and comes late", remedy


def _other_programs(bundle: Bundle, system: System) -> Verdict:
    share = system.foreign_share()
    detail = f"{share:.0%} of all processors, over one second"
    if share > meter.MAX_FOREIGN_SHARE:
        return "warn", detail, "stop them: `top` names them; threads that have no processor to themselves hold up all"
    return "ok", detail, None


def _throttling_now(bundle: Bundle, system: System) -> Verdict:
    reasons = probe.read_throttling(system)["now"]
    if reasons is None:
        raise FactError(
            "neither a Raspberry Pi's firmware nor a cooling device that slows the processor is there to ask"
        )
    return _throttled(reasons) if reasons else ("ok", "nothing holds the clock down", None)


def _throttling_since_boot(bundle: Bundle, system: System) -> Verdict:
    reasons = probe.read_throttling(system)["since_boot"]
    if reasons is None:
        raise FactError("neither a Raspberry Pi's firmware nor x86's counters are there to ask")
    return _throttled(reasons) if reasons else ("ok", "nothing has held the clock down", None)


def _throttled(reasons: list[str]) -> Verdict:
    supply = "a supply that holds 5 V under load: 5 V 5 A for a Raspberry Pi 5, and a short cable"
    cooling = "a fan or a larger heat sink"
    volts = [reason == "under-voltage" for reason in reasons]
    remedies = [*([supply] if any(volts) else []), *([] if all(volts) else [cooling])]
    return "warn", ", ".join(reasons), "; ".join(remedies)


# Memory, disk, clock


def _meminfo(system: System, key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB$", system.read("/proc/meminfo") or "", re.MULTILINE)
    if match is None:
        raise FactError(f"/proc/meminfo has no {key}")
    return int(match[1]) * 1024


def _memory_now(bundle: Bundle, system: System) -> Verdict:
    available, wanted = _meminfo(system, "MemAvailable"), bundle.wanted_bytes
    detail = f"{available >> 20} MiB available, {wanted >> 20} MiB are needed for the model, its context and the server"
    if available < wanted:
        return "fail", detail, "stop other programs, a server of this model that runs already among them"
    return "ok", detail, None


def _memory_limit(bundle: Bundle, system: System) -> Verdict:
    group, wanted = cgroup.memory(system), bundle.wanted_bytes
    if group is None:
        return "ok", "the control group sets none", None
    detail = f"the control group has {max(0, group.room_bytes) >> 20} of {group.limit_bytes >> 20} MiB left"
    if group.room_bytes < wanted:
        more = f", {wanted >> 20} MiB are needed for the model, its context and the server"
        return "fail", detail + more, "raise it: docker --memory, systemd MemoryMax="
    return "ok", detail, None


def _memory_cgroup(bundle: Bundle, system: System) -> Verdict:
    if cgroup.memory_enabled(system):
        return "ok", "the kernel can limit a group's memory", None
    told = "cgroup_disable=memory" in (system.text("/proc/cmdline") or "")
    detail = "off in the kernel" + (" (cgroup_disable=memory)" if told else "")
    remedy = "add cgroup_enable=memory to the kernel's command line (Raspberry Pi: /boot/firmware/cmdline.txt), restart"
    return "warn", f"{detail}: docker --memory and systemd's MemoryMax= are without effect", remedy


def _swap(bundle: Bundle, system: System) -> Verdict:
    total = _meminfo(system, "SwapTotal")
    used = total - _meminfo(system, "SwapFree")
    detail = f"{used >> 20} of {total >> 20} MiB used" if total else "none"
    if used > _SWAP_BYTES:
        return "warn", detail, "stop other programs: a model of which parts are in swap answers slowly"
    return "ok", detail, None


def _disk(bundle: Bundle, system: System) -> Verdict:
    free = system.free_bytes(bundle.root)
    wanted = sum(int(facts["bytes"]) for facts in bundle.manifest["files"].values())
    detail = f"{free >> 20} MiB free, the next release of this size needs {wanted >> 20}"
    if free < wanted:
        return "warn", detail, "free some space, or move the bundle to a larger disk"
    return "ok", detail, None


def _clock(bundle: Bundle, system: System) -> Verdict:
    year = system.year()
    if year < _FIRST_YEAR:
        return "warn", f"it says {year}: certificates and timestamps are wrong", "sudo timedatectl set-ntp true"
    return "ok", f"it says {year}", None


# The GPU


def _l4t(bundle: Bundle, system: System) -> Verdict:
    version = probe.read_l4t(system)
    if version in _BAD_L4T:
        return (
            "warn",
            f"{version}: {_BAD_L4T[version]}",
            "another release of L4T, older or newer",
        )
    return "ok", version, None


def _power_mode(bundle: Bundle, system: System) -> Verdict:
    return "ok", probe.read_power_mode(system), None


def _cuda(bundle: Bundle, system: System) -> Verdict:
    """CUDA's major version is a matter of the library that the programs load; the driver offers it and older ones."""
    names = [re.fullmatch(r"libcudart\.so\.(\d+)", name) for name in bundle.manifest["runtime"]["device_libraries"]]
    built = next((int(match[1]) for match in names if match), None)
    if built is None:
        raise FactError("the manifest's device_libraries name no libcudart.so: built for an unknown CUDA")
    version = system.cuda_driver()
    if version is None:
        raise FactError(
            "no libcuda.so.1 that answers", remedy="install the driver; in a container: docker run --runtime nvidia"
        )
    offered = version // 1000
    detail = (
        f"the driver offers {offered}.{version % 1000 // 10} (L4T {probe.l4t(system) or 'unknown'}), "
        f"the programs are built for CUDA {built}"
    )
    if offered == built:
        return "ok", detail, None
    remedy = f"install a bundle that was built for CUDA {offered}, or the JetPack that brings CUDA {built}"
    return "fail" if offered < built else "warn", detail, remedy


def _backend(bundle: Bundle, system: System) -> Verdict:
    serve.require_backend(bundle)
    expected = str(bundle.manifest["runtime"]["backend"])
    return "ok", "CPU: no GPU is promised" if expected == "CPU" else f"the programs find {expected}", None


_LOOKS: dict[str, Look] = {
    "instruction set": _instruction_set,
    "memory now": _memory_now,
    "memory limit": _memory_limit,
    "memory cgroup": _memory_cgroup,
    "swap": _swap,
    "disk": _disk,
    "cpu quota": _cpu_quota,
    "governor": _governor,
    "other programs": _other_programs,
    "throttling now": _throttling_now,
    "throttling since boot": _throttling_since_boot,
    "clock": _clock,
}
_JETSON_LOOKS: dict[str, Look] = {"L4T": _l4t, "power mode": _power_mode}
