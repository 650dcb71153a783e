"""From NVIDIA's wheels, without docker, root or a GPU: a CUDA toolkit for building aarch64 programs on an x86-64 host,
and the libraries that those programs need on the device.

nvcc and its parts run on this host; headers and libraries are the device's. The toolkit's folder is laid out as nvcc
and CMake's FindCUDAToolkit look for it.
"""

import fnmatch
import platform
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

from toolchain.errors import HostError
from toolchain.gguf import pinned
from toolchain.reporter import Reporter
from toolchain.resources import versions

PLACEHOLDER = "{cuda_cross}"
"""Stands for the toolkit's folder in a profile's CMake options."""

_TOP = "nvidia/cu13/"
_TARGETS = ("aarch64-linux", "sbsa-linux", "x86_64-linux")
"""Under whichever of these names nvcc or CMake looks for the target's half."""
_FREE_BYTES = 1_500_000_000
_LAYOUT = {"layout": 2}
"""Raise when the toolkit's folder is put together otherwise."""
_SAME_NAMES = """\
#!/bin/sh
# Names of symbols hold a checksum of this path: the same in a folder of any name gives the same code.
for given in "$@"; do
  shift
  [ "$before" = --orig_src_path_name ] && given=${given##*/vendor/llama.cpp/}
  set -- "$@" "$given"
  before=$given
done
exec "$0.real" "$@"
"""
"""In the place of cudafe++, which nvcc calls."""


def link_flags(folder: Path) -> str:
    """For programs: where the libraries of a library are, which need not be whole here; the device has them."""
    return f"-Wl,-rpath-link,{folder}/lib -Wl,--allow-shlib-undefined"


def line() -> str:
    """What it is, for the key of a build."""
    return "; ".join([*(f"{wheel['name']} {wheel['version']}" for wheel in _pins()), "names without folders"])


def nvcc_line(nvcc: str) -> str | None:
    """What another nvcc says of its release; None when it does not run."""
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release .+", answer.stdout)
    return f"nvcc {found[0]}" if found else answer.stdout.strip()[-80:]


def make(cache: Path, *, report: Reporter) -> Path:
    """The toolkit below `cache`, put together at the first call: 650 MB to fetch, 470 MB to keep.

    Raises HostError on another host than x86-64 or without room, ExternalToolError when a wheel cannot be had.
    """
    if platform.machine() != "x86_64":
        raise HostError(
            f"this host is {platform.machine()}; the cross toolkit runs on x86_64", hint="build on the device itself"
        )
    home = cache / "cuda"

    def fill(out: Path) -> None:
        _fill(out, _pins(), log=home / "pip.log", report=report)
        _lay_out(out)

    pins = [*_pins(), _LAYOUT]
    return pinned.once(home, pins, fill, what="the CUDA toolkit", needed=_FREE_BYTES, report=report)


def device_libraries() -> frozenset[str]:
    """Names of the libraries that `device_folder` has."""
    return frozenset(Path(name).name for wheel in _device_pins() for name in wheel["only"])


def device_folder(cache: Path, *, report: Reporter) -> Path:
    """A folder with lib/, what programs for CUDA 13 need on an aarch64 device, and licences/.

    540 MB to fetch, 690 MB to keep. Raises HostError without room, ExternalToolError when a wheel cannot be had.
    """
    home = cache / "cuda-device"

    def fill(out: Path) -> None:
        _fill(out, _device_pins(), log=home / "pip.log", report=report)
        (out / "licences").mkdir()
        for wheel in _device_pins():
            (path,) = (out.parent / wheel["name"]).glob("*.whl")
            with zipfile.ZipFile(path) as archive:
                (text,) = (name for name in archive.namelist() if name.endswith("/licenses/License.txt"))
                (out / "licences" / wheel["name"]).write_bytes(archive.read(text))

    what = "CUDA's libraries for the device"
    return pinned.once(home, _device_pins(), fill, what=what, needed=_FREE_BYTES, report=report)


def _pins() -> list[dict[str, Any]]:
    pins: list[dict[str, Any]] = versions()["cuda_cross"]["wheels"]
    return pins


def _device_pins() -> list[dict[str, Any]]:
    pins: list[dict[str, Any]] = versions()["cuda_device"]["wheels"]
    return pins


def _fill(out: Path, pins: list[dict[str, Any]], *, log: Path, report: Reporter) -> None:
    """What is wanted of each wheel, below `out`; wheels lie beside it until all is done."""
    for wheel in pins:
        report.line(f"fetching {wheel['name']} {wheel['version']}, {wheel['platform']}")
        fetched = pinned.from_index(
            *(wheel["name"], wheel["version"], wheel["sha256"], out.parent / wheel["name"]),
            options=["--only-binary=:all:", "--platform", wheel["platform"]],
            log=log,
            hint="a package index must be reachable",
        )
        _unpack(fetched, out, wheel.get("only", ["*"]))


def _unpack(wheel: Path, out: Path, only: list[str]) -> None:
    """Its files below nvidia/cu13 that match `only`; programs can be executed."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(_TOP)
            if name == member.filename or member.is_dir() or not any(fnmatch.fnmatch(name, one) for one in only):
                continue
            path = (out / name).resolve()
            if not path.is_relative_to(out.resolve()):
                raise HostError(f"{wheel.name}: {member.filename} leads out of it")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            if "bin" in Path(name).parts[:2]:
                path.chmod(0o755)


def _lay_out(root: Path) -> None:
    """Plain names for libraries that have only a versioned one, the target's half under each name it goes by, and code
    that does not depend on where it is compiled."""
    front_end = root / "bin" / "cudafe++"
    front_end.rename(root / "bin" / "cudafe++.real")
    front_end.write_text(_SAME_NAMES, encoding="utf-8")
    front_end.chmod(0o755)
    for library in sorted((root / "lib").glob("lib*.so.*")):
        plain = library.with_name(library.name.partition(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)
    (root / "lib64").symlink_to("lib")
    for target in _TARGETS:
        folder = root / "targets" / target
        folder.mkdir(parents=True)
        for name in ("include", "lib"):
            (folder / name).symlink_to(Path("..", "..", name))
