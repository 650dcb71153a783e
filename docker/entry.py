"""First in a container: is it run in a way that can work? Then the toolchain itself, in this process's place.

What a container cannot see from inside is asked of the host in one line with its remedy, before six hours are spent.
TOOLCHAIN_GPU is "required" in the train image; "optional" lets it run on a processor.
"""

import argparse
import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path

DRIVER_NEEDED = 580
"""Major version of the driver that CUDA 13, which torch is built with, asks for."""
SHARED_MEMORY_NEEDED = 512 << 20
"""Docker gives 64 MiB; NCCL and torch's workers pass tensors through it."""
READS = ("doctor", "plan", "quadlet", "schema", "verify")
"""Verbs that write nothing."""


def problems(arguments: list[str]) -> list[tuple[str, str]]:
    """What will not do, each with its remedy."""
    found = []
    work = work_folder(arguments)
    if not os.access(work, os.W_OK):
        user = f"{os.getuid()}:{os.getgid()}"
        found.append(
            (
                f"{work} cannot be written by user {user}",
                'mount a folder of yours and run as yourself: -v "$PWD":/work --user "$(id -u):$(id -g)"',
            )
        )
    if os.environ.get("TOOLCHAIN_GPU", "optional") == "required":
        found += gpu_problems()
        size = os.statvfs("/dev/shm")  # noqa: S108 - asked how large it is
        if size.f_blocks * size.f_frsize < SHARED_MEMORY_NEEDED:
            mib = (size.f_blocks * size.f_frsize) >> 20
            needed = SHARED_MEMORY_NEEDED >> 20
            found.append((f"shared memory, /dev/shm, has {mib} MiB, {needed} are needed", "docker run --shm-size 2g"))
        home = os.environ.get("HOME", "/")
        if os.statvfs(home).f_flag & os.ST_NOEXEC:
            remedy = f"docker run --tmpfs {home}:exec"
            found.append((f"{home} is mounted noexec, and Triton loads its kernels from there", remedy))
    return found


def work_folder(arguments: list[str]) -> Path:
    """What is there of the folder that will be written to: --work, else the one it was started in."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--work", default=".")
    try:
        folder = Path(parser.parse_known_args(arguments)[0].work).absolute()
    except argparse.ArgumentError:  # --work without a folder: the verb will say so
        folder = Path.cwd()
    return next(path for path in (folder, *folder.parents) if path.exists())


def gpu_problems() -> list[tuple[str, str]]:
    """The driver is asked itself, by its management library, which the container toolkit mounts with a GPU."""
    missing = (
        "no NVIDIA GPU in this container",
        "docker run --gpus all (needs the NVIDIA container toolkit on the host); "
        "for a processor alone, slow: -e TOOLCHAIN_GPU=optional",
    )
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return [missing]
    count, version = ctypes.c_uint(), ctypes.create_string_buffer(80)
    if library.nvmlInit_v2() != 0:
        return [missing]
    try:
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0 or count.value == 0:
            return [missing]
        library.nvmlSystemGetDriverVersion(version, ctypes.c_uint(80))
    finally:
        library.nvmlShutdown()
    return driver_problems(version.value.decode(errors="replace"))


def driver_problems(version: str) -> list[tuple[str, str]]:
    major = re.match(r"\d+", version)
    if major is not None and int(major[0]) >= DRIVER_NEEDED:
        return []
    return [
        (
            f"the host's NVIDIA driver is {version or 'of no known version'}, CUDA 13 needs {DRIVER_NEEDED} or newer",
            "update the driver on the host; the container needs no change",
        )
    ]


def main() -> None:
    arguments = sys.argv[1:]
    # Help and what only reads must work anywhere.
    asks_only = not arguments or arguments[0] in READS or {"-h", "--help", "--version"} & set(arguments)
    found = [] if asks_only else problems(arguments)
    for problem, remedy in found:
        print(f"error: {problem}", file=sys.stderr)
        print(f"hint: {remedy}", file=sys.stderr)
    if found:
        sys.exit(3)
    with contextlib.suppress(OSError):
        os.execvp("toolchain", ["toolchain", *arguments])  # noqa: S606 - there is no shell to need
    print("error: no toolchain in this image", file=sys.stderr)
    sys.exit(3)


if __name__ == "__main__":
    main()
