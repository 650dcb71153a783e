"""`edgectl doctor` on machines written by hand: a Pi 5, two Orins, an old x86, a container; and on this one."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import toolchain.device
from toolchain.device import cgroup, cores, doctor, files, probe, processor, verify
from toolchain.device.doctor import Finding
from toolchain.device.facts import FactError
from toolchain.device.system import System
from toolchain.gguf.llama_cpp import flags_of
from toolchain.target import read_target, targets

DEVICE = Path(toolchain.device.__file__).parent
_MIB = 1 << 20
_MODEL_BYTES = 768 * _MIB  # with the cache
_CACHE_BYTES = 100 * _MIB
_WANTED_MIB = 1024
"""Of memory, for the model above and its server."""
_SMALL_FILES = {"sha256": "0" * 64, "bytes": 8 * _MIB, "mode": "0644"}


@dataclass(frozen=True)
class Machine(System):
    """A tree of files, and what programs and drivers would say."""

    programs: dict[str, str] = field(default_factory=dict)
    cuda: int | None = None
    free: int = 64 << 30
    foreign: float | None = 0.0
    this_year: int = 2026

    def run(self, argv: Sequence[str]) -> str | None:
        return self.programs.get(" ".join(argv))

    def cuda_driver(self) -> int | None:
        return self.cuda

    def free_bytes(self, folder: Path) -> int:
        return self.free

    def foreign_share(self) -> float:
        if self.foreign is None:
            raise FactError("/proc/stat cannot be read: garbage")
        return self.foreign

    def year(self) -> int:
        return self.this_year

    def plant(self, files: dict[str, str]) -> None:
        for path, content in files.items():
            place = self.root / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content)


def meminfo(available_mib: int = 6000, swap_used_mib: int = 0) -> str:
    free = 2048 - swap_used_mib
    return (
        f"MemTotal:        8245000 kB\nMemFree:          100000 kB\nMemAvailable:   {available_mib * 1024} kB\n"
        f"SwapTotal:       2097152 kB\nSwapFree:        {free * 1024} kB\n"
    )


_A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
_A72 = "fp asimd evtstrm crc32 cpuid"
_CGROUPS = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t80\t1\nmemory\t0\t80\t{}\n"
_GROUP = "/sys/fs/cgroup/system.slice/model.service"


def arm_cpuinfo(*features: str) -> str:
    return "\n".join(f"processor\t: {number}\nFeatures\t: {line}\n" for number, line in enumerate(features))


@pytest.fixture
def pi5(tmp_path: Path) -> Machine:
    """A Raspberry Pi 5 in good order, its fan turning."""
    machine = Machine(tmp_path / "pi5", programs={"vcgencmd get_throttled": "throttled=0x0\n"})
    machine.plant(
        {
            "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "/proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
            "/proc/cpuinfo": arm_cpuinfo(_A76, _A76, _A76, _A76),
            "/proc/meminfo": meminfo(),
            "/proc/cmdline": "coherent_pool=1M cgroup_disable=memory console=tty1 cgroup_enable=memory rootwait\n",
            "/proc/self/cgroup": "0::/system.slice/model.service\n",
            "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
            f"{_GROUP}/memory.max": "max\n",
            f"{_GROUP}/cpu.max": "max 100000\n",
            "/sys/class/thermal/cooling_device0/type": "pwm-fan\n",
            "/sys/class/thermal/cooling_device0/cur_state": "3\n",
            **{f"/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_governor": "performance\n" for n in range(4)},
        }
    )
    return machine


def orin(root: Path, *, release: str, cuda: int) -> Machine:
    machine = Machine(root, programs={"nvpmodel -q": "NV Power Mode: 15W\n0\n"}, cuda=cuda)
    machine.plant(
        {
            "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
            "/proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
            "/etc/nv_tegra_release": release,
            "/proc/cpuinfo": arm_cpuinfo(*[_A76 + " ilrcpc flagm"] * 6),
            "/proc/meminfo": meminfo(),
            "/proc/self/cgroup": "0::/\n",
            "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc\n",
            "/sys/class/thermal/cooling_device0/type": "cpu-throttle-alert\n",
            "/sys/class/thermal/cooling_device0/cur_state": "0\n",
            "/sys/class/thermal/cooling_device0/max_state": "1\n",
            "/sys/class/thermal/cooling_device1/type": "hot-surface-alert\n",
            "/sys/class/thermal/cooling_device1/cur_state": "1\n",
            **{f"/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_governor": "schedutil\n" for n in range(6)},
        }
    )
    return machine


_JETPACK_6 = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37\n"
)
_JETPACK_7 = (
    "# R39 (release), REVISION: 1.0, GCID: 41000000, BOARD: generic, EABI: aarch64, DATE: Mon Jun  1 00:00:00\n"
)


@pytest.fixture
def jetpack6(tmp_path: Path) -> Machine:
    return orin(tmp_path / "jetpack6", release=_JETPACK_6, cuda=12060)


@pytest.fixture
def jetpack7(tmp_path: Path) -> Machine:
    return orin(tmp_path / "jetpack7", release=_JETPACK_7, cuda=13020)


@pytest.fixture
def old_x86(tmp_path: Path) -> Machine:
    """Before SSE4.2 and AVX, control groups of version 1, its cores too hot at times."""
    machine = Machine(tmp_path / "x86")
    machine.plant(
        {
            "/sys/class/dmi/id/product_name": "OptiPlex 740\n",
            "/proc/cpuinfo": "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu sse sse2 pni cx16 lm\n",
            "/proc/meminfo": meminfo(),
            "/proc/cgroups": _CGROUPS.format(1),
            "/proc/self/cgroup": "4:memory:/user.slice\n3:cpu,cpuacct:/user.slice\n1:name=systemd:/user.slice\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/memory/user.slice/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/cpu/user.slice/cpu.cfs_quota_us": "-1\n",
            "/sys/fs/cgroup/cpu/user.slice/cpu.cfs_period_us": "100000\n",
            "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "12\n",
            "/sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "5\n",
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
            "/sys/class/thermal/cooling_device0/type": "Processor\n",
            "/sys/class/thermal/cooling_device0/cur_state": "0\n",
            "/sys/class/thermal/cooling_device1/type": "CPU Fan\n",
            "/sys/class/thermal/cooling_device1/cur_state": "2\n",
        }
    )
    return machine


@pytest.fixture
def container(tmp_path: Path) -> Machine:
    """On x86, with limits of its own, which it sees as the top of the tree; nothing of clocks or heat is shown."""
    machine = Machine(tmp_path / "container")
    machine.plant(
        {
            "/proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu sse2 sse4_1 sse4_2 avx avx2 bmi2 fma f16c\n",
            "/proc/meminfo": meminfo(),
            "/proc/self/cgroup": "0::/\n",
            "/sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
            "/sys/fs/cgroup/memory.max": f"{1536 * _MIB}\n",
            "/sys/fs/cgroup/memory.current": f"{900 * _MIB}\n",
            "/sys/fs/cgroup/memory.stat": f"anon 4096\ninactive_file {500 * _MIB}\nactive_file 0\n",
            "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        }
    )
    return machine


Make = Callable[..., files.Bundle]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that makes as much of a bundle as doctor looks at, for one of the toolchain's targets."""

    def bundle(target: str, **runtime: Any) -> files.Bundle:
        profile = read_target(target)
        root = tmp_path / "bundle"
        (root / "runtime/bin").mkdir(parents=True)
        server = root / "runtime/bin/llama-server"
        server.write_text("#!/bin/sh\necho 'Available devices:'\necho '  CUDA0: Orin (7607 MiB, 6000 MiB free)'\n")
        server.chmod(0o755)
        presets = {
            "server": {"threads": profile.server.threads, "argv": ["llama-server"], "ready_timeout_s": 60},
            "devices": {"argv": ["{bundle}/runtime/bin/llama-server", "--list-devices"]},
        }
        (root / "presets.json").write_text(json.dumps(presets))
        manifest = {
            "schema_version": files.SCHEMA_VERSION,
            "bundle_id": "sha256:" + "0" * 64,
            "name": "tiny",
            "version": "1.0",
            "target": {"name": target, "arch": profile.arch},
            "runtime": {
                "folder": "runtime/bin",
                "flags": list(flags_of(profile.runtime.cmake)),
                "backend": profile.runtime.backend,
                "glibc_needed": "none",
                "device_libraries": list(profile.runtime.device_libraries),
                "segment_alignment": 65536,
                **runtime,
            },
            "model": {
                "file": "model/tiny.gguf",
                "bytes": _MODEL_BYTES - _CACHE_BYTES,
                "cache_bytes": _CACHE_BYTES,
                "context": 64,
                "parallel": 1,
            },
            "files": {"model/tiny.gguf": {**_SMALL_FILES, "bytes": _MODEL_BYTES}, "presets.json": _SMALL_FILES},
        }
        return files.Bundle(root, manifest, "0" * 64)

    return bundle


def looked(bundle: files.Bundle, machine: Machine) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(bundle, machine)}


def checked(bundle: files.Bundle, machine: Machine) -> dict[str, tuple[bool, str]]:
    """What verify, and with it install, makes of the machine."""
    return {item["name"]: (item["ok"], item["detail"]) for item in verify.host_checks(bundle, machine)}


def level_and_detail(finding: Finding) -> tuple[str, str]:
    return finding.level, finding.detail


HOST_CHECKS = {"architecture", "glibc", "page size", "memory"}
LOOKS = {*doctor._LOOKS, "backend"}


# Whole machines


def test_a_pi_in_good_order(make: Make, pi5: Machine) -> None:
    found = looked(make("rpi5"), pi5)
    assert found.keys() == HOST_CHECKS | LOOKS
    assert {name: finding.level for name, finding in found.items() if name in LOOKS} == dict.fromkeys(LOOKS, "ok")
    assert found["instruction set"].detail == (
        "asimd, atomics, asimdrdm, crc32, asimddp, fphp, asimdhp: all that the programs need"
    )
    assert found["memory now"].detail == (
        f"6000 MiB available, {_WANTED_MIB} MiB are needed for the model, its context and the server"
    )
    assert found["memory limit"].detail == found["cpu quota"].detail == "the control group sets none"
    assert found["swap"].detail == "0 of 2048 MiB used"
    assert found["disk"].detail == "65536 MiB free, the next release of this size needs 776"
    assert found["throttling now"].detail == "nothing holds the clock down"
    assert found["throttling since boot"].detail == "nothing has held the clock down"
    assert found["clock"].detail == "it says 2026"
    assert found["backend"].detail == "CPU: no GPU is promised"
    assert not any(finding.remedy for finding in found.values())


def test_a_jetson_with_jetpack_6(make: Make, jetpack6: Machine) -> None:
    found = looked(make("jetson-orin"), jetpack6)
    assert found.keys() == HOST_CHECKS | LOOKS | {"libraries", "L4T", "power mode", "CUDA"}
    assert level_and_detail(found["L4T"]) == ("ok", "36.4.3")
    assert level_and_detail(found["power mode"]) == ("ok", "15W")
    assert level_and_detail(found["CUDA"]) == (
        "ok",
        "the driver offers 12.6 (L4T 36.4.3), the programs are built for CUDA 12",
    )
    assert level_and_detail(found["backend"]) == ("ok", "the programs find CUDA")
    assert level_and_detail(found["throttling now"]) == ("ok", "nothing holds the clock down")
    assert found["throttling since boot"].level == "unknown"
    assert level_and_detail(found["governor"]) == ("warn", "schedutil: the clock follows the load, and comes late")


def test_a_jetson_with_jetpack_7(make: Make, jetpack7: Machine) -> None:
    found = looked(make("jetson-orin-jp7"), jetpack7)
    assert level_and_detail(found["L4T"]) == ("ok", "39.1.0")
    assert level_and_detail(found["CUDA"]) == (
        "ok",
        "the driver offers 13.2 (L4T 39.1.0), the programs are built for CUDA 13",
    )


def test_an_old_x86(make: Make, old_x86: Machine) -> None:
    found = looked(make("x86-cpu"), old_x86)
    assert found.keys() == HOST_CHECKS | LOOKS
    assert level_and_detail(found["instruction set"]) == (
        "fail",
        "this processor lacks sse4_2; the programs need sse4_2",
    )
    assert found["instruction set"].remedy is not None
    assert level_and_detail(found["memory limit"]) == ("ok", "the control group sets none")
    assert level_and_detail(found["cpu quota"]) == ("ok", "the control group sets none")
    assert level_and_detail(found["throttling now"]) == ("ok", "nothing holds the clock down")
    assert level_and_detail(found["throttling since boot"]) == ("warn", "cores too hot, 17 times")
    assert doctor.unfit(found.values())


def test_a_container_with_limits(make: Make, container: Machine) -> None:
    found = looked(make("x86-cpu"), container)
    assert level_and_detail(found["instruction set"]) == ("ok", "sse4_2: all that the programs need")
    assert level_and_detail(found["memory limit"]) == ("ok", "the control group has 1136 of 1536 MiB left")
    assert level_and_detail(found["cpu quota"]) == ("ok", "the control group grants 1.5 processors")
    for name in ("governor", "throttling now", "throttling since boot"):
        assert found[name].level == "unknown", name
        assert found[name].detail, name


# The instruction set


def test_a_pi_4_lacks_what_a_pi_5_has(make: Make, pi5: Machine) -> None:
    pi5.plant({"/proc/cpuinfo": arm_cpuinfo(_A72)})
    finding = looked(make("rpi5"), pi5)["instruction set"]
    assert finding.level == "fail"
    assert finding.detail.startswith("this processor lacks atomics, asimdrdm, asimddp, fphp, asimdhp;")


def test_verify_refuses_the_processor_that_doctor_refuses_and_none_that_is_unknown(make: Make, pi5: Machine) -> None:
    bundle = make("rpi5")
    assert checked(bundle, pi5)["instruction set"] == (
        True,
        "asimd, atomics, asimdrdm, crc32, asimddp, fphp, asimdhp",
    )
    pi5.plant({"/proc/cpuinfo": arm_cpuinfo(_A72)})
    right, detail = checked(bundle, pi5)["instruction set"]
    assert not right
    assert detail == looked(bundle, pi5)["instruction set"].detail
    (pi5.root / "proc/cpuinfo").unlink()
    right, detail = checked(bundle, pi5)["instruction set"]
    assert right
    assert detail.startswith("not known: /proc/cpuinfo has no Features")


def test_what_one_core_lacks_the_processor_lacks(make: Make, pi5: Machine) -> None:
    pi5.plant({"/proc/cpuinfo": arm_cpuinfo(_A76, _A76.replace(" asimddp", ""))})
    finding = looked(make("rpi5"), pi5)["instruction set"]
    assert finding.detail.startswith("this processor lacks asimddp;")


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        ({}, ["asimd"]),
        ({"GGML_CPU_ALL_VARIANTS": True}, ["asimd"]),
        ({"GGML_CPU_ARM_ARCH": "armv8-a+crc+crypto"}, ["asimd", "crc32", "aes", "sha1", "sha2"]),
        ({"GGML_CPU_ARM_ARCH": "armv8.1-a+i8mm+nocrc"}, ["asimd", "atomics", "asimdrdm", "i8mm"]),
    ],
)
def test_needs_on_arm_follow_from_the_flags(flags: dict[str, str | bool], needed: list[str]) -> None:
    options = processor._options(list(flags_of({"GGML_NATIVE": False, **flags})))
    assert processor._needed_by_arm(options) == needed


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        ({}, ["sse4_2", "avx", "avx2", "bmi2", "fma", "f16c"]),
        ({"GGML_AVX2": False, "GGML_FMA": False, "GGML_BMI2": False}, ["sse4_2", "avx", "f16c"]),
        ({"CMAKE_SYSTEM_NAME": "Linux"}, ["sse4_2"]),
        ({"GGML_CPU_ALL_VARIANTS": True}, ["sse4_2"]),
        ({"CMAKE_SYSTEM_NAME": "Linux", "GGML_AVX_VNNI": True}, ["sse4_2", "avx_vnni"]),
    ],
)
def test_needs_on_x86_follow_from_the_flags(flags: dict[str, str | bool], needed: list[str]) -> None:
    options = processor._options(list(flags_of({"GGML_NATIVE": False, **flags})))
    assert processor._needed_by_x86(options) == needed


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("-DGGML_NATIVE=ON", "GGML_NATIVE"),
        ("-DGGML_CPU_ARM_ARCH=armv9-a", "what armv9-a asks"),
        ("-DGGML_CPU_ARM_ARCH=armv8-a+future", r"what \+future asks"),
        ("-DCMAKE_C_FLAGS:STRING=-mcpu=cortex-a76", "chooses a processor"),
    ],
)
def test_needs_that_cannot_be_known_are_not_guessed(make: Make, pi5: Machine, flag: str, reason: str) -> None:
    finding = looked(make("rpi5", flags=["-DGGML_NATIVE=OFF", flag]), pi5)["instruction set"]
    assert finding.level == "unknown"
    with pytest.raises(FactError, match=reason):
        processor._needed_by_arm(processor._options(["-DGGML_NATIVE=OFF", flag]))


@pytest.mark.parametrize("name", sorted(targets()))
def test_the_needs_of_every_target_are_known(name: str) -> None:
    profile = read_target(name)
    options = processor._options(list(flags_of(profile.runtime.cmake)))
    assert (processor._needed_by_arm if profile.arch == "aarch64" else processor._needed_by_x86)(options)


# Memory, swap, disk, clock


def test_memory_that_others_use_is_not_there(make: Make, pi5: Machine) -> None:
    pi5.plant({"/proc/meminfo": meminfo(available_mib=1000, swap_used_mib=300)})
    found = looked(make("rpi5"), pi5)
    assert level_and_detail(found["memory now"]) == (
        "fail",
        f"1000 MiB available, {_WANTED_MIB} MiB are needed for the model, its context and the server",
    )
    assert level_and_detail(found["swap"]) == ("warn", "300 of 2048 MiB used")
    assert found["memory now"].remedy is not None
    assert found["swap"].remedy is not None


def test_every_group_above_counts(make: Make, pi5: Machine) -> None:
    above = "/sys/fs/cgroup/system.slice"
    pi5.plant({f"{above}/memory.max": f"{900 * _MIB}", f"{above}/memory.current": f"{400 * _MIB}"})
    pi5.plant({f"{above}/cpu.max": "50000 100000"})
    found = looked(make("rpi5"), pi5)
    assert found["memory limit"].level == "fail"
    assert found["memory limit"].detail.startswith("the control group has 500 of 900 MiB left, 1024 MiB are needed")
    assert level_and_detail(found["cpu quota"]) == ("warn", "the control group grants 0.5 processors, to 4 threads")


def test_groups_of_version_1_count(old_x86: Machine) -> None:
    folder = "/sys/fs/cgroup/memory/user.slice"
    old_x86.plant(
        {
            f"{folder}/memory.limit_in_bytes": f"{2048 * _MIB}",
            f"{folder}/memory.usage_in_bytes": f"{1000 * _MIB}",
            f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {200 * _MIB}\n",
            "/sys/fs/cgroup/cpu/user.slice/cpu.cfs_quota_us": "250000\n",
        }
    )
    assert cgroup.memory(old_x86) == cgroup.Memory(2048 * _MIB, 1248 * _MIB)
    assert cores.cpu_quota(old_x86) == 2.5


def test_verify_reads_the_limits_that_doctor_reads(make: Make, pi5: Machine, old_x86: Machine) -> None:
    above = "/sys/fs/cgroup/system.slice"
    pi5.plant({f"{above}/memory.max": f"{900 * _MIB}", f"{above}/memory.current": "0"})
    bundle = make("rpi5")
    assert checked(bundle, pi5)["memory"] == (
        False,
        "900 MiB here, 1024 MiB are needed for the model, its context and the server",
    )
    old_x86.plant({"/sys/fs/cgroup/memory/user.slice/memory.limit_in_bytes": f"{800 * _MIB}"})
    assert checked(bundle, old_x86)["memory"][1].startswith("800 MiB here")
    old_x86.plant({"/sys/fs/cgroup/memory/user.slice/memory.limit_in_bytes": "garbage"})
    assert checked(bundle, old_x86)["memory"] == (
        True,
        "8051 MiB here, 1024 MiB are needed for the model, its context and the server",
    )


@pytest.mark.parametrize("listed", ["0::/../other\n", "0::/not/mounted/here\n", "garbage\n", ""])
def test_a_group_whose_folder_is_not_shown_is_the_top_one(container: Machine, listed: str) -> None:
    container.plant({"/proc/self/cgroup": listed})
    assert cgroup.memory(container) == cgroup.Memory(1536 * _MIB, 1136 * _MIB)


def test_a_kernel_without_the_memory_group(make: Make, pi5: Machine) -> None:
    pi5.plant(
        {
            "/proc/cmdline": "cgroup_disable=memory console=tty1",
            "/proc/cgroups": _CGROUPS.format(0),
            "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids",
        }
    )
    finding = looked(make("rpi5"), pi5)["memory cgroup"]
    assert finding.level == "warn"
    assert finding.detail.startswith("off in the kernel (cgroup_disable=memory)")
    assert "cgroup_enable=memory" in str(finding.remedy)


def test_a_full_disk_an_unset_clock_and_a_busy_machine(make: Make, pi5: Machine) -> None:
    found = looked(make("rpi5"), replace(pi5, free=500 * _MIB, this_year=1970, foreign=0.4))
    assert level_and_detail(found["disk"]) == ("warn", "500 MiB free, the next release of this size needs 776")
    assert level_and_detail(found["clock"]) == ("warn", "it says 1970: certificates and timestamps are wrong")
    assert level_and_detail(found["other programs"]) == ("warn", "40% of all processors, over one second")
    assert all(found[name].remedy for name in ("disk", "clock", "other programs"))


# Throttling


def test_low_voltage_now_is_told_with_its_remedy(make: Make, pi5: Machine) -> None:
    found = looked(make("rpi5"), replace(pi5, programs={"vcgencmd get_throttled": "throttled=0x50001\n"}))
    assert level_and_detail(found["throttling now"]) == ("warn", "under-voltage")
    assert "5 V 5 A" in str(found["throttling now"].remedy)
    assert "fan" not in str(found["throttling now"].remedy)
    assert level_and_detail(found["throttling since boot"]) == ("warn", "under-voltage, throttled")
    assert not doctor.unfit(found[name] for name in LOOKS)


@pytest.mark.parametrize("folder", ["soc/soc:firmware", "soc@107c000000/soc@107c000000:firmware"])
def test_without_vcgencmd_the_kernel_is_asked(pi5: Machine, folder: str) -> None:
    pi5.plant({f"/sys/devices/platform/{folder}/get_throttled": "e0008\n"})
    assert probe.throttling(replace(pi5, programs={})) == {
        "now": ["soft temperature limit"],
        "since_boot": ["frequency capped", "throttled", "soft temperature limit"],
    }


def test_a_pi_whose_firmware_does_not_answer_is_unknown(make: Make, pi5: Machine) -> None:
    mute = replace(pi5, programs={})
    assert probe.throttling(mute) is None
    found = looked(make("rpi5"), mute)
    for name in ("throttling now", "throttling since boot"):
        assert found[name].level == "unknown"
        assert "vcgencmd does not answer" in found[name].detail
        assert "video" in str(found[name].remedy)


def test_a_cooling_device_that_takes_speed_away_is_told(jetpack6: Machine) -> None:
    jetpack6.plant({"/sys/class/thermal/cooling_device0/cur_state": "1\n"})
    assert probe.throttling(jetpack6) == {"now": ["cpu-throttle-alert at 1 of 1"], "since_boot": None}


def test_where_nothing_tells_there_is_no_record(container: Machine) -> None:
    assert probe.throttling(container) is None


# Jetson


def test_a_release_known_to_be_bad_is_told(make: Make, jetpack6: Machine) -> None:
    jetpack6.plant({"/etc/nv_tegra_release": _JETPACK_6.replace("4.3", "4.7")})
    finding = looked(make("jetson-orin"), jetpack6)["L4T"]
    assert finding.level == "warn"
    assert finding.detail.startswith("36.4.7: large allocations on the GPU fail")
    assert finding.remedy is not None


def test_programs_for_a_newer_cuda_do_not_fit(make: Make, jetpack6: Machine) -> None:
    finding = looked(make("jetson-orin-jp7"), jetpack6)["CUDA"]
    assert finding.level == "fail"
    assert finding.detail.startswith("the driver offers 12.6 (L4T 36.4.3), the programs are built for CUDA 13")
    assert "built for CUDA 12" in str(finding.remedy)


def test_programs_for_an_older_cuda_are_told(make: Make, jetpack7: Machine) -> None:
    assert looked(make("jetson-orin"), jetpack7)["CUDA"].level == "warn"


def test_a_jetson_in_a_container_that_sees_little_of_it(make: Make, jetpack6: Machine) -> None:
    (jetpack6.root / "etc/nv_tegra_release").unlink()
    found = looked(make("jetson-orin"), replace(jetpack6, programs={}, cuda=None))
    for name in ("L4T", "power mode", "CUDA"):
        assert found[name].level == "unknown", name
        assert found[name].remedy, name


def test_a_bundle_without_a_cuda_library_says_nothing_of_its_cuda(make: Make, jetpack6: Machine) -> None:
    finding = looked(make("jetson-orin", device_libraries=["libcuda.so.1"]), jetpack6)["CUDA"]
    assert finding.level == "unknown"


def test_a_bundle_for_the_processor_is_not_asked_for_cuda(make: Make, jetpack6: Machine) -> None:
    found = looked(make("rpi5"), jetpack6)
    assert found.keys() == HOST_CHECKS | LOOKS | {"L4T", "power mode"}


@pytest.mark.parametrize(
    "says",
    [
        "echo 'Available devices:'",
        "echo 'CUDA error: out of memory'; exit 1",
        "echo 'CUDA error: out of memory'",
        "echo '  CUDA0: Orin (7607 MiB, 6000 MiB free)'; kill -ABRT $$",
    ],
)
def test_a_promised_gpu_that_is_not_found_fails(make: Make, jetpack6: Machine, says: str) -> None:
    bundle = make("jetson-orin")
    (bundle.programs / "llama-server").write_text(f"#!/bin/sh\n{says}\n")
    finding = looked(bundle, jetpack6)["backend"]
    assert finding.level == "fail"
    assert finding.detail.startswith("llama-server finds no CUDA device")
    assert finding.remedy is not None


# What is damaged or closed


GARBAGE = {
    "/proc/cpuinfo": "instruction set",
    "/proc/meminfo": "memory now",
    f"{_GROUP}/memory.max": "memory limit",
    f"{_GROUP}/cpu.max": "cpu quota",
}


@pytest.mark.parametrize("path", GARBAGE, ids=lambda path: path.rpartition("/")[2])
@pytest.mark.parametrize("content", ["", "gar\0bage \ufffd", "-", "9" * 5000])
def test_garbage_is_unknown_with_the_reason(make: Make, pi5: Machine, path: str, content: str) -> None:
    pi5.plant({path: content})
    finding = looked(make("rpi5"), pi5)[GARBAGE[path]]
    assert finding.level == "unknown"
    assert finding.detail
    assert len(finding.detail) < 200


@pytest.mark.parametrize("path", GARBAGE, ids=lambda path: path.rpartition("/")[2])
def test_what_is_closed_is_unknown_with_the_reason(make: Make, pi5: Machine, path: str) -> None:
    place = pi5.root / path.lstrip("/")
    place.unlink()
    place.mkdir()  # root may read any file, and no folder as one
    finding = looked(make("rpi5"), pi5)[GARBAGE[path]]
    assert level_and_detail(finding) == ("unknown", f"{path} cannot be read: Is a directory")


@pytest.mark.parametrize("said", ["", "throttled=", "throttled=zz", "VCHI initialization failed", "0x" + "f" * 40])
def test_a_firmware_that_talks_nonsense_is_unknown(make: Make, pi5: Machine, said: str) -> None:
    confused = replace(pi5, programs={"vcgencmd get_throttled": said})
    assert looked(make("rpi5"), confused)["throttling now"].level == "unknown"
    assert probe.throttling(confused) is None


@pytest.mark.parametrize("state", ["", "hot", None])
def test_a_cooling_device_that_talks_nonsense_is_unknown(make: Make, jetpack6: Machine, state: str | None) -> None:
    place = jetpack6.root / "sys/class/thermal/cooling_device0/cur_state"
    place.unlink() if state is None else place.write_text(state)
    finding = looked(make("jetson-orin"), jetpack6)["throttling now"]
    assert finding.level == "unknown"
    assert "cooling_device0" in finding.detail


@pytest.mark.parametrize("said", ["", "NV Power Mode:", "NVPM ERROR: no access"])
def test_a_power_mode_without_a_name_is_unknown(make: Make, jetpack6: Machine, said: str) -> None:
    confused = replace(jetpack6, programs={"nvpmodel -q": said})
    assert looked(make("jetson-orin"), confused)["power mode"].level == "unknown"
    assert probe.power_mode(confused) is None


@pytest.mark.parametrize("text", ["", "R36", "# R36 (release)", "\0\0"])
def test_a_release_that_cannot_be_read_is_unknown(make: Make, jetpack6: Machine, text: str) -> None:
    jetpack6.plant({"/etc/nv_tegra_release": text})
    assert looked(make("jetson-orin"), jetpack6)["L4T"].level == "unknown"
    assert probe.l4t(jetpack6) is None


def test_an_empty_machine_is_unknown_and_nothing_is_left_out(make: Make, tmp_path: Path) -> None:
    found = looked(make("rpi5"), Machine(tmp_path / "nothing", foreign=None))
    assert found.keys() == HOST_CHECKS | LOOKS
    unknown = {name for name, finding in found.items() if finding.level == "unknown"}
    assert unknown == LOOKS - {"memory limit", "cpu quota", "disk", "clock", "backend"}
    assert all(found[name].detail for name in unknown)


def test_a_damaged_bundle_is_a_finding(make: Make, container: Machine) -> None:
    bundle = make("x86-cpu")
    (bundle.root / "presets.json").write_text("{")
    finding = looked(bundle, container)["cpu quota"]
    assert finding.level == "fail"
    assert "presets.json is damaged" in finding.detail


# The verb, and the machine that the tests run on


def test_the_real_system_reads_runs_and_gives_up(tmp_path: Path) -> None:
    system = System(tmp_path)
    (tmp_path / "number").write_text("12\n")
    assert system.number("/number") == 12
    assert system.read("/none") is None
    assert system.text("/number/below") is None
    assert system.glob("/n*") == ["/number"]
    assert system.run(["true"]) == ""
    assert system.run(["false"]) is None
    assert system.run(["a-program-that-is-not-there"]) is None
    assert system.free_bytes(tmp_path) > 0
    assert 0 <= system.foreign_share() <= 1
    with pytest.raises(FactError, match="does not say: No such file"):
        system.free_bytes(tmp_path / "none")


def test_the_table_shows_levels_and_remedies() -> None:
    findings = [Finding("swap", "ok", "none"), Finding("disk", "warn", "full", "free some space")]
    assert doctor.table(findings) == (
        "ok       swap  none\nwarn     disk  full\n         → free some space\nfit for this bundle: 1 warn, 1 ok"
    )
    unknown = doctor.table([Finding("L4T", "unknown", "no release")])
    assert unknown == "unknown  L4T  no release\nfit for this bundle, as far as is known: 1 unknown"
    failed = doctor.table([*findings, Finding("GPU", "fail", "none")])
    assert failed.endswith("FAIL     GPU   none\nnot fit for this bundle: 1 fail, 1 warn, 1 ok")


def edgectl(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-I", "-S", str(root / "edgectl"), *arguments]
    return subprocess.run(argv, env={}, capture_output=True, text=True, check=False, timeout=60)


def test_the_verb_on_this_machine(make: Make) -> None:
    arch = platform.machine()
    bundle = make("x86-cpu")
    bundle.manifest["target"]["arch"] = arch
    shutil.copytree(DEVICE, bundle.root / "device", ignore=shutil.ignore_patterns("__pycache__", "edgectl.py"))
    shutil.copyfile(DEVICE / "edgectl.py", bundle.root / "edgectl")
    manifest = bundle.root / "manifest.json"
    manifest.write_text(json.dumps(bundle.manifest))

    result = edgectl(bundle.root, "doctor", "--json")
    assert result.stderr == ""
    record = json.loads(result.stdout)
    assert (record["schema_version"], record["bundle"]) == (doctor.SCHEMA_VERSION, bundle.id)
    names = [finding["name"] for finding in record["findings"]]
    assert set(names) >= HOST_CHECKS | LOOKS
    assert len(names) == len(set(names))
    assert all(finding.keys() == {"name", "level", "detail", "remedy"} for finding in record["findings"])
    failed = any(finding["level"] == "fail" for finding in record["findings"])
    assert (record["ok"], result.returncode) == (not failed, int(failed))

    bundle.manifest["target"]["arch"] = "riscv64" if arch != "riscv64" else "x86_64"
    manifest.write_text(json.dumps(bundle.manifest))
    result = edgectl(bundle.root, "doctor")
    assert result.returncode == 1
    assert result.stdout.startswith("FAIL     architecture ")
    assert "\nnot fit for this bundle: " in result.stdout


def test_probe_records_how_the_board_runs() -> None:
    facts = probe.probe()
    assert {"throttling", "power_mode", "l4t"} <= facts.keys()
    json.dumps(facts)
