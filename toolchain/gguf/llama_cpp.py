"""The pinned llama.cpp: fetch its source, build it once for every run on this machine, find what was built.

Nothing here but `fetch` and `build` reaches the network or starts a compiler; stages call `find`.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import process
from toolchain.artifact import digest_file
from toolchain.disk import require_free
from toolchain.errors import ExternalToolError, HostError
from toolchain.gguf import cuda_toolkit, pinned, sysroot
from toolchain.reporter import Reporter, Silent, Task
from toolchain.resources import versions

TARGETS = ("llama-server", "llama-bench", "llama-quantize", "llama-imatrix")

SHARED_FLAGS: Mapping[str, str | bool] = {
    "CMAKE_BUILD_TYPE": "Release",
    "LLAMA_OPENSSL": False,
    "LLAMA_BUILD_TESTS": False,
    "LLAMA_BUILD_EXAMPLES": False,
    "LLAMA_USE_PREBUILT_UI": False,  # would download it
    "LLAMA_BUILD_UI": False,
    "LLAMA_BUILD_NUMBER": "0",  # the source distribution has no history to count
}
"""What every build has; a target adds its own."""

C_LIBRARY_VARIANTS = ("__memcpy_*", "__memmove_*", "__memset_*")
"""Functions of glibc that it chooses among at start, by what the processor says that it can do (its ifuncs)."""

BROKEN = ("libggml-cpu-sapphirerapids.so",)
"""Libraries that no build keeps: this one is chosen wherever AMX is, and ends there by SIGILL, since the compiler drops
the tile configuration that it makes on the stack (llama.cpp's pull request 26954). The next best one is as fast."""

_PATCHES = Path(__file__).with_name("patches")
"""Unified diffs of llama.cpp's own folder, with what each one is for: docs/decisions/0015-patches.md."""

_LAYOUT = 1
"""Raise when the content of an installed build changes, so that older ones are built again."""

_FREE_BYTES = 1_500_000_000
"""Source, objects and programs of the largest CPU build together, with room to spare."""

_NOT_INHERITED = (
    *("CMAKE_TOOLCHAIN_FILE", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
)
"""Variables by which the caller's surroundings would get into a build."""
_CROSS = re.compile(r"(?P<host>(?P<arch>x86_64|aarch64)-linux-gnu)-(?P<kind>gcc|g\+\+)")
"""A cross compiler as Debian calls it; its package has the same words the other way round."""
_DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}

_CACHE_HINT = "set TOOLCHAIN_CACHE to a folder that is yours to write"
_BUILD_HINT = (
    "`toolchain llama-cpp build` fetches and builds it once; for another device: `toolchain runtime build`; in a "
    "container without a compiler: mount the cache of a machine where that was done (docs/containers.md)"
)


@dataclass(frozen=True)
class LlamaCpp:
    """One installed build."""

    root: Path
    commit: str
    key: str
    flags: tuple[str, ...]
    """CMake options, as given to it."""

    @property
    def digest(self) -> str:
        """What a stage's fingerprint takes for all of llama.cpp."""
        return self.key

    @property
    def bin(self) -> Path:
        """Programs, shared libraries and compute backends, side by side."""
        return self.root / "bin"

    @property
    def libraries(self) -> Path:
        """The C++ library that it was built against, for bundles made elsewhere; static programs have none."""
        return self.root / "lib"

    @property
    def passed(self) -> Path:
        """A file that remembers which rules for instructions it was held against; no part of what was built."""
        return self.root / "isa.json"

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def converter(self) -> Path:
        return self.source / "convert_hf_to_gguf.py"

    @property
    def bindings(self) -> Path:
        """Folder to put on `sys.path` for the ctypes package `llama_cpp`."""
        return self.root / "bindings"

    @property
    def licence(self) -> Path:
        return self.source / "LICENSE"

    def program(self, name: str) -> Path:
        """Path of a program such as "llama-quantize". Raises HostError."""
        path = self.bin / name
        if not path.is_file():
            raise HostError(f"{path}: no such program in this build of llama.cpp", hint=_BUILD_HINT)
        return path


def cache_folder() -> Path:
    """$TOOLCHAIN_CACHE, $XDG_CACHE_HOME/toolchain or ~/.cache/toolchain. Raises HostError where none can be."""
    own, shared = os.environ.get("TOOLCHAIN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "toolchain"
    name = "TOOLCHAIN_CACHE" if own else "XDG_CACHE_HOME" if shared else "the cache"
    try:
        file = next((path for path in (folder, *folder.absolute().parents) if path.is_file()), None)
    except OSError as error:
        raise HostError(f"{name}: {folder} cannot be read: {error.strerror}", hint=_CACHE_HINT) from None
    if file is not None:
        raise HostError(f"{name}: {folder} cannot be a folder, {file} is a file", hint=_CACHE_HINT)
    return folder


def physical_cores() -> int:
    """Physical cores that this process may run on."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(tuple((topology / name).read_text() for name in ("physical_package_id", "core_id")))
        except OSError:
            cores.add((str(cpu),))
    return len(cores)


def flags_of(cmake: Mapping[str, str | bool]) -> tuple[str, ...]:
    """The CMake options of a build, shared ones first; a target's own value wins."""
    merged = {**SHARED_FLAGS, **_commit_flags(), **cmake}
    return tuple(f"-D{name}={_cmake_value(value)}" for name, value in merged.items())


def _commit_flags() -> dict[str, str | bool]:
    """Told, not asked of git: what that says depends on its being there, on who owns the files, and on their times."""
    commit = str(versions()["llama_cpp"]["commit"])[:7]
    return {"LLAMA_BUILD_COMMIT": commit, "GGML_BUILD_COMMIT": commit, "GIT_EXE": False}


def archive_path() -> Path:
    """Where the pinned source distribution lies in the cache, once it is fetched."""
    pin = versions()["llama_cpp"]
    return cache_folder() / "downloads" / f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"


def patches() -> list[Path]:
    """What is changed in the pinned source, in the order in which it is applied."""
    return sorted(_PATCHES.glob("*.patch"))


def fetch(*, report: Reporter | None = None) -> Path:
    """Download the pinned source distribution into the cache and check its SHA-256; returns its path.

    Raises HostError or ExternalToolError when it cannot be had, HostError when its digest differs.
    """
    pin = versions()["llama_cpp"]
    archive = archive_path()
    if archive.is_file():
        pinned.check_digest(archive, pin["sha256"])
        return archive
    (report or Silent()).line(f"fetching {pin['package']} {pin['version']} (77 MB)")
    partial = archive.parent / f"{pin['sha256'][:12]}.partial"
    fetched = pinned.from_index(
        *(pin["package"], pin["version"], pin["sha256"], partial),
        options=["--no-binary=:all:"],
        log=archive.parent / "pip.log",
        hint=f"a package index must be reachable, or put the file there yourself: {archive}",
    )
    fetched.replace(archive)
    shutil.rmtree(partial)
    return archive


def build(cmake: Mapping[str, str | bool], *, report: Reporter) -> LlamaCpp:
    """Build llama.cpp with the shared flags and `cmake`, once; returns the build that is there already.

    Raises HostError when a compiler, CMake, ninja or disk is missing, ExternalToolError when the build fails.
    """
    compiler = _compiler_line(cmake)
    if compiler is None:
        raise _no_compiler(cmake)
    request = _request(cmake)
    key = _key(request, compiler)
    home = cache_folder() / "llama.cpp"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{home}: cannot be made: {error.strerror}", hint=_CACHE_HINT) from None
    with pinned.lock(home / f"{key}.lock", report, doing="building this llama.cpp"):
        final = home / key
        if final.is_dir():
            return _open(final)
        hint = "free some space, or set TOOLCHAIN_CACHE to a folder on another disk"
        require_free(home, _FREE_BYTES * (3 if "GGML_CUDA" in cmake else 1), "the build", hint=hint)
        partial = home / f"{key}.partial"
        partial.mkdir(exist_ok=True)
        sdist, objects = compiled(cmake, partial, wanted=TARGETS, log=home / f"{key}.log", report=report)
        commit = versions()["llama_cpp"]["commit"]
        install(sdist, objects, partial / "install", cmake, {**request, "compiler": compiler, "commit": commit})
        older = sysroot.make(cache_folder(), report=report) if _asks(cmake, sysroot.PLACEHOLDER) else None
        _take_along(partial / "install", cmake, older)
        (partial / "install").rename(final)
        shutil.rmtree(partial)
    return _open(final)


def compiled(
    cmake: Mapping[str, str | bool], folder: Path, *, wanted: Sequence[str], log: Path, report: Reporter
) -> tuple[Path, Path]:
    """Unpack the source below `folder` and make the `wanted` there: the unpacked distribution, and the build's folder.

    Goes on where a call that was killed has stopped. Raises HostError, ExternalToolError.
    """
    tools = {name: _tool(name) for name in ("cmake", "ninja")}
    sdist = _unpack(fetch(report=report), folder / "sdist")
    objects, hint = folder / "build", f"full output: {log}"
    # Not the caller's own: they would change the build without changing its key. No path of this machine in it.
    no_paths = f"-ffile-prefix-map={sdist}=."
    env = {"CFLAGS": no_paths, "CXXFLAGS": no_paths, "CUDAFLAGS": f"-Xcompiler={no_paths}", "LDFLAGS": ""}
    # Gone, not empty: where NVCC_CCBIN is empty, nvcc says "No such file or directory" and nothing else.
    without = list(_NOT_INHERITED)
    if "CMAKE_CUDA_HOST_COMPILER" in cmake:
        without.append("CUDAHOSTCXX")  # CMake would take it before the option
    if _asks(cmake, cuda_toolkit.PLACEHOLDER):
        toolkit = cuda_toolkit.make(cache_folder(), report=report)
        cmake = _filled(cmake, cuda_toolkit.PLACEHOLDER, toolkit)
        env["LDFLAGS"] += cuda_toolkit.link_flags(toolkit)
    if _asks(cmake, sysroot.PLACEHOLDER):
        older = sysroot.make(cache_folder(), report=report)
        cmake = _filled(cmake, sysroot.PLACEHOLDER, older)
        env["CXXFLAGS"] += f" {sysroot.compiler_flags(older)}"
        env["LDFLAGS"] += sysroot.link_flags(older)
    argv = configure_argv(tools, sdist / "vendor" / "llama.cpp", objects, cmake)
    process.run(argv, log=log, env=env, without=without, hint=hint)
    with _ninja_bar(report) as on_line:
        argv = [str(tools["ninja"]), "-C", str(objects), *wanted]
        process.run(argv, log=log, env=env, without=without, on_line=on_line, hint=hint)
    return sdist, objects


def _asks(cmake: Mapping[str, str | bool], placeholder: str) -> bool:
    return any(isinstance(value, str) and placeholder in value for value in cmake.values())


def _filled(cmake: Mapping[str, str | bool], placeholder: str, folder: Path) -> dict[str, str | bool]:
    """The options with a folder in the place of what stands for it."""
    return {
        name: value.replace(placeholder, str(folder)) if isinstance(value, str) else value
        for name, value in cmake.items()
    }


def _take_along(installed: Path, cmake: Mapping[str, str | bool], older: Path | None) -> None:
    """The C++ library that programs were built against, the compiler's own or an `older` system's: a bundle may be made
    elsewhere. Not among them: on this host its newer one does as well, for whatever else a process has loaded."""
    if not any(b"\0libstdc++.so.6\0" in path.read_bytes() for path in (installed / "bin").iterdir()):
        return
    out = installed / "lib"
    out.mkdir()
    for name in sysroot.LIBRARIES:
        path = older / "usr" / "lib" / name if older is not None else library_of(_compilers(cmake)[1], name)
        if path is not None:
            shutil.copyfile(path, out / name)


def library_of(compiler: str, name: str) -> Path | None:
    """Where a compiler has a library of its own; None where it has none."""
    answer = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = Path(answer.stdout.strip())
    return path if path.is_absolute() and path.is_file() else None


def _no_compiler(cmake: Mapping[str, str | bool]) -> HostError:
    names = _compilers(cmake)
    if all(shutil.which(name) for name in names):
        hint = "put CUDA's bin folder on PATH, or name the compiler: runtime.cmake.CMAKE_CUDA_COMPILER"
        return HostError(f"no CUDA compiler: looked for {_nvcc(cmake)}", hint=hint)
    hint = "apt-get install build-essential"
    cross = [_CROSS.fullmatch(name) for name in names]
    if all(cross):
        packages = [f"{found['kind']}-{found['host'].replace('_', '-')}" for found in cross if found]
        packages += [f"libc6-dev-{_DEBIAN[found['arch']]}-cross" for found in cross[:1] if found]
        hint = f"apt-get install {' '.join(packages)}"
    elif "CMAKE_SYSTEM_NAME" in cmake:
        hint = "put them on PATH, or name others: runtime.cmake.CMAKE_C_COMPILER and CMAKE_CXX_COMPILER"
    return HostError(f"no C and C++ compiler: looked for {' and '.join(names)}", hint=hint)


def find(cmake: Mapping[str, str | bool]) -> LlamaCpp:
    """The build with these options, by this machine's compiler if there is one. Raises HostError when there is none."""
    request = _request(cmake)
    home = cache_folder() / "llama.cpp"
    compiler = _compiler_line(cmake)
    exact = home / _key(request, compiler) if compiler else None
    if exact is not None and exact.is_dir():
        return _open(exact)
    # A machine without a compiler, or with a newer one, can use what was built.
    others = [
        record.parent
        for record in home.glob("*/build.json")
        if not record.parent.name.endswith(".partial")
        and {name: value for name, value in _read(record).items() if name in request} == request
    ]
    if not others:
        raise HostError(f"llama.cpp is not built with these options (looked in {home})", hint=_BUILD_HINT)
    return _open(max(others, key=lambda folder: (folder.stat().st_mtime, folder.name)))


def configure_argv(
    tools: Mapping[str, Path], source: Path, objects: Path, cmake: Mapping[str, str | bool]
) -> list[str]:
    make = f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"
    return [str(tools["cmake"]), "-S", str(source), "-B", str(objects), "-G", "Ninja", make, *flags_of(cmake)]


def install(sdist: Path, objects: Path, out: Path, cmake: Mapping[str, str | bool], facts: Mapping[str, Any]) -> None:
    """Copy what runs from an unpacked source distribution and its build folder to `out`, and write build.json.

    A library lies under its SONAME, with a link of the plain name for those that open it by hand.
    """
    shutil.rmtree(out, ignore_errors=True)
    source = sdist / "vendor" / "llama.cpp"
    binaries = out / "bin"
    binaries.mkdir(parents=True)
    for path in sorted((objects / "bin").iterdir()):
        if path.is_symlink() or not path.is_file():
            continue
        library = re.fullmatch(r"(.+\.so)(\.\d+)(\.[\d.]+)?", path.name)
        if library is None and ".so" not in path.name and path.name not in TARGETS:
            continue
        if path.name in BROKEN:
            continue
        target = binaries / (library[1] + library[2] if library else path.name)
        # CMake leaves "$ORIGIN:", and the empty entry after the colon would be the current directory.
        target.write_bytes(path.read_bytes().replace(b"$ORIGIN:\0", b"$ORIGIN\0\0"))
        target.chmod(0o755)
        if library:
            (binaries / library[1]).symlink_to(target.name)
    missing = [name for name in TARGETS if not (binaries / name).is_file()]
    if missing:
        raise ExternalToolError(f"the build made no {', '.join(missing)}", hint=f"looked in {objects / 'bin'}")
    _strip(binaries, cmake)
    kept = out / "source"
    kept.mkdir()
    for name in ("convert_hf_to_gguf.py", "LICENSE"):
        shutil.copy2(source / name, kept / name)
    for name in ("conversion", "licenses", "gguf-py/gguf"):
        shutil.copytree(source / name, kept / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        sdist / "llama_cpp",
        out / "bindings" / "llama_cpp",
        ignore=shutil.ignore_patterns("__pycache__", "server", "lib"),
    )
    shutil.copy2(sdist / "LICENSE.md", out / "bindings" / "LICENSE.md")
    sizes = {path.name: path.stat().st_size for path in sorted(binaries.iterdir()) if not path.is_symlink()}
    record = json.dumps({**facts, "sizes": sizes}, indent=2) + "\n"
    (out / "build.json").write_text(record, encoding="utf-8")


def _cmake_value(value: str | bool) -> str:
    return value if isinstance(value, str) else "ON" if value else "OFF"


def _compilers(cmake: Mapping[str, str | bool]) -> tuple[str, str]:
    return (
        str(cmake.get("CMAKE_C_COMPILER") or os.environ.get("CC") or "cc"),
        str(cmake.get("CMAKE_CXX_COMPILER") or os.environ.get("CXX") or "c++"),
    )


def _compiler_line(cmake: Mapping[str, str | bool]) -> str | None:
    """First lines of what both compilers say of themselves; None when one is missing."""
    lines = []
    for name in _compilers(cmake):
        try:
            answer = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        lines.append(answer.stdout.splitlines()[0] if answer.stdout else name)
    if cmake.get("GGML_CUDA") is True:
        own = _asks(cmake, cuda_toolkit.PLACEHOLDER)
        cuda = cuda_toolkit.line() if own else cuda_toolkit.nvcc_line(_nvcc(cmake))
        if cuda is None:
            return None
        lines.append(cuda)
    if _asks(cmake, sysroot.PLACEHOLDER):
        lines.append(sysroot.line())
    return "; ".join(lines)


def _nvcc(cmake: Mapping[str, str | bool]) -> str:
    return str(cmake.get("CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX") or "nvcc")


def _tool(name: str) -> Path:
    """A build tool: the wheel's in this environment, then PATH."""
    own = Path(sys.prefix) / "bin" / name
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        raise HostError(f"no {name} in this environment or on PATH", hint="pip install -c constraints.txt -e '.[gguf]'")
    return Path(found)


def _request(cmake: Mapping[str, str | bool]) -> dict[str, Any]:
    """What is asked for; the compiler is what it is obtained with."""
    return {
        "layout": _LAYOUT,
        "source_sha256": versions()["llama_cpp"]["sha256"],
        "flags": sorted(flags_of(cmake)),
        "patches": {path.name: digest_file(path) for path in patches()},
        "targets": list(TARGETS),
        "left_out": list(BROKEN),
        "arch": str(cmake.get("CMAKE_SYSTEM_PROCESSOR") or platform.machine()),
    }


def _key(request: Mapping[str, Any], compiler: str) -> str:
    text = json.dumps({**request, "compiler": compiler}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(record: Path) -> dict[str, Any]:
    try:
        raw = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HostError(
            f"{record}: cannot be read: {error}", hint=f"delete {record.parent}, then build again"
        ) from None
    return dict(raw)


def _open(folder: Path) -> LlamaCpp:
    record = _read(folder / "build.json")
    return LlamaCpp(root=folder, commit=record["commit"], key=folder.name, flags=tuple(record["flags"]))


def _unpack(archive: Path, out: Path) -> Path:
    """The archive's one top folder, unpacked and patched below `out` unless a complete copy is there."""
    if not out.is_dir():
        draft = out.with_name(out.name + ".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(draft, **pinned.tar_filter())  # noqa: S202 - its digest is pinned
        (top,) = draft.iterdir()
        for path in patches():
            _apply(path, top / "vendor" / "llama.cpp")
        draft.rename(out)
    (top,) = out.iterdir()
    return top


def _apply(path: Path, source: Path) -> None:
    """Raises HostError when a patch does not fit the source to the letter."""
    import patch_ng

    patch = patch_ng.fromfile(str(path))
    if not patch or patch.errors or not patch.apply(strip=1, root=str(source)):
        pin = versions()["llama_cpp"]
        raise HostError(
            f"{path.name} does not fit the source of {pin['package']} {pin['version']}",
            hint=f"make it anew for the source that docker/versions.toml pins, or remove it: {path}",
        )


def _strip(binaries: Path, cmake: Mapping[str, str | bool]) -> None:
    """Remove symbols that only a debugger reads, where a `strip` for the machine's code is at hand."""
    cross = "CMAKE_SYSTEM_NAME" in cmake
    strip = shutil.which(str(cmake["CMAKE_STRIP"])) if "CMAKE_STRIP" in cmake else None if cross else "strip"
    if strip is not None and shutil.which(strip) is not None:
        files = [str(path) for path in sorted(binaries.iterdir()) if not path.is_symlink()]
        # The names of a static C library's variants stay: whoever inspects the instructions must know them.
        kept = [f"--keep-symbol={name}" for name in C_LIBRARY_VARIANTS]
        subprocess.run([strip, "--strip-unneeded", "--wildcard", *kept, *files], check=True)


@contextmanager
def _ninja_bar(report: Reporter) -> Iterator[Callable[[str], None]]:
    """Turn ninja's "[12/469] Building …" into a bar."""
    task: Task | None = None
    done = 0

    def on_line(line: str) -> None:
        nonlocal task, done
        step = re.match(r"\[(\d+)/(\d+)\]", line)
        if step is None:
            return
        if task is None:
            task = report.start("building llama.cpp", total=int(step[2]), unit="file")
        task.advance(int(step[1]) - done)
        done = int(step[1])

    try:
        yield on_line
    finally:
        if task is not None:
            report.finish(task)
