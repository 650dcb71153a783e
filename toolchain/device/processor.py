"""What the programs ask of a processor, by the options they were built with, and what this one offers."""

import re
from typing import Any

from .facts import FactError, Files

_ARM_STEPS: dict[str, tuple[str, ...]] = {
    "armv8-a": ("asimd",),
    "armv8.1-a": ("atomics", "asimdrdm", "crc32"),
    "armv8.2-a": (),
    "armv8.3-a": ("jscvt", "fcma", "lrcpc"),
    "armv8.4-a": ("asimddp", "flagm", "ilrcpc"),
    "armv8.5-a": ("flagm2", "frint", "sb"),
    "armv8.6-a": ("i8mm", "bf16"),
}
"""Compiler's name of an architecture → what it adds to the one before, as Linux calls it in /proc/cpuinfo."""
_ARM_EXTENSIONS: dict[str, tuple[str, ...]] = {
    "fp": ("fp",),
    "simd": ("asimd",),
    "crc": ("crc32",),
    "crypto": ("aes", "sha1", "sha2"),
    "lse": ("atomics",),
    "rdma": ("asimdrdm",),
    "dotprod": ("asimddp",),
    "fp16": ("fphp", "asimdhp"),
    "i8mm": ("i8mm",),
    "bf16": ("bf16",),
    "sve": ("sve",),
    "sve2": ("sve2",),
    "sme": ("sme",),
}
_X86_OPTIONS: dict[str, tuple[str, ...]] = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_AVX2": ("avx2",),
    "GGML_BMI2": ("bmi2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
}
"""On by ggml's default in a build that is neither native, nor cross-compiled, nor of all variants."""
_X86_EXTRA_OPTIONS: dict[str, tuple[str, ...]] = {
    "GGML_AVX_VNNI": ("avx_vnni",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "GGML_AVX512_VBMI": ("avx512_vbmi",),
    "GGML_AVX512_VNNI": ("avx512_vnni",),
    "GGML_AVX512_BF16": ("avx512_bf16",),
}


def needed_and_missing(manifest: dict[str, Any], files: Files) -> tuple[list[str], list[str]]:
    """What the programs need, as Linux calls it in /proc/cpuinfo, and what of that is not here. Raises FactError."""
    arch, flags = str(manifest["target"]["arch"]), _options(manifest["runtime"]["flags"])
    needed = _needed_by_arm(flags) if arch == "aarch64" else _needed_by_x86(flags)
    offered = _offered(arch, files)
    return needed, [name for name in needed if name not in offered]


def lacks(needed: list[str], missing: list[str]) -> str:
    return f"this processor lacks {', '.join(missing)}; the programs need {', '.join(needed)}"


def _options(flags: list[str]) -> dict[str, str]:
    """CMake's -DNAME=VALUE or -DNAME:TYPE=VALUE as a table."""
    pairs = (flag.removeprefix("-D").partition("=") for flag in flags if flag.startswith("-D"))
    return {name.partition(":")[0]: value for name, _, value in pairs}


def _is_on(value: str) -> bool:
    return value.upper() in ("ON", "TRUE", "YES", "Y", "1")


def _refuse_unknown_needs(flags: dict[str, str]) -> None:
    """Raises FactError when the options leave open what the programs ask of the processor."""
    # ggml's own default: native, but in a cross build.
    if _is_on(flags.get("GGML_NATIVE", "OFF" if "CMAKE_SYSTEM_NAME" in flags else "ON")):
        raise FactError("the programs were built for whatever their build host had (GGML_NATIVE)")
    for name, value in flags.items():
        if re.fullmatch(r"CMAKE_C(XX)?_FLAGS(_\w+)?", name) and re.search(r"-m(arch|cpu)=", value):
            raise FactError(f"{name}={value} chooses a processor, whose needs are not known here")


def _needed_by_arm(flags: dict[str, str]) -> list[str]:
    """Of every core, as Linux calls it. Raises FactError."""
    _refuse_unknown_needs(flags)
    if _is_on(flags.get("GGML_CPU_ALL_VARIANTS", "")):
        return ["asimd"]  # and of the rest whatever there is
    base, *extensions = (flags.get("GGML_CPU_ARM_ARCH") or "armv8-a").split("+")
    if base not in _ARM_STEPS:
        raise FactError(f"what {base} asks of a processor is not known here")
    steps = list(_ARM_STEPS)[: list(_ARM_STEPS).index(base) + 1]
    needed = [name for step in steps for name in _ARM_STEPS[step]]
    for extension in extensions:
        if extension.startswith("no"):
            needed = [name for name in needed if name not in _ARM_EXTENSIONS.get(extension[2:], ())]
        elif extension not in _ARM_EXTENSIONS:
            raise FactError(f"what +{extension} asks of a processor is not known here")
        else:
            needed += _ARM_EXTENSIONS[extension]
    return list(dict.fromkeys(needed))


def _needed_by_x86(flags: dict[str, str]) -> list[str]:
    """Raises FactError."""
    _refuse_unknown_needs(flags)
    needed = ["sse4_2"]
    if _is_on(flags.get("GGML_CPU_ALL_VARIANTS", "")):
        return needed  # and of the rest whatever there is
    default = "OFF" if "CMAKE_SYSTEM_NAME" in flags else "ON"
    for option, names in _X86_OPTIONS.items():
        needed += names if _is_on(flags.get(option, default)) else ()
    for option, names in _X86_EXTRA_OPTIONS.items():
        needed += names if _is_on(flags.get(option, "OFF")) else ()
    return list(dict.fromkeys(needed))


def _offered(arch: str, files: Files) -> set[str]:
    """What every core has. Raises FactError."""
    key = "Features" if arch == "aarch64" else "flags"
    found = re.findall(rf"^{key}\s*:(.*)$", files.read("/proc/cpuinfo") or "", re.MULTILINE)
    if not found:
        raise FactError(f"/proc/cpuinfo has no {key}: not a processor of the kind {arch}, or the file is closed to us")
    return set.intersection(*(set(line.split()) for line in found))
