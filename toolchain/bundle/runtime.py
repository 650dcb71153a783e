"""From a build of llama.cpp to the programs and libraries that a device needs, inspected: nothing but glibc is missing.

glibc's symbol versions and the ELF fields are described in the System V ABI and the Linux Standard Base.
"""

import errno
import fnmatch
import hashlib
import json
import platform
import posixpath
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection

from toolchain.artifact import write_atomic
from toolchain.bundle import command, fatbin
from toolchain.errors import ExternalToolError, HostError
from toolchain.gguf.llama_cpp import LlamaCpp, library_of
from toolchain.target import TargetProfile

PROGRAMS = ("llama-server", "llama-bench")
COMPILER_LIBRARIES = ("libstdc++.so.6", "libgcc_s.so.1")
"""Taken along from the build host: an older device may have older ones, or none."""
_GLIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}
_LOADERS = ("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1")
_OBJDUMP_BYTES = 8 << 20
"""Of disassembly that is searched at a time."""
_INSTRUCTION = re.compile(r"\s*[0-9a-f]+:\t")
"""How objdump begins the line of one; others name the file, a section or a function."""
_ORIGIN = re.compile(r"\$(?:ORIGIN|\{ORIGIN\})(/.*)?")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MACHINE = {"EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}


@dataclass(frozen=True)
class Elf:
    """What one program or library asks of the machine it runs on."""

    arch: str
    needed: tuple[str, ...]
    soname: str | None
    search: tuple[str, ...]
    """RPATH and RUNPATH, split; an empty entry would be the working directory."""
    glibc: tuple[int, ...]
    """Newest GLIBC_ version among its undefined symbols; empty when there is none."""
    glibc_symbol: str
    """A symbol of that version."""
    alignment: int
    """Least alignment of its loadable segments, in bytes: the largest page size it can be mapped with."""


@dataclass(frozen=True)
class RuntimeFacts:
    """What was copied, measured."""

    files: tuple[str, ...]
    glibc_needed: str
    segment_alignment: int
    bytes: int
    compiler: str
    """What compiled the server, as it says itself."""


def read_elf(path: Path) -> Elf:
    """Facts of the ELF file at `path`. Raises ExternalToolError when it is not one."""
    try:
        with path.open("rb") as file:
            elf = ELFFile(file)
            needed: list[str] = []
            search: list[str] = []
            soname: str | None = None
            for section in elf.iter_sections():
                if isinstance(section, DynamicSection):
                    for tag in section.iter_tags():
                        if tag.entry.d_tag == "DT_NEEDED":
                            needed.append(str(tag.needed))
                        elif tag.entry.d_tag == "DT_SONAME":
                            soname = str(tag.soname)
                        elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                            text = tag.rpath if tag.entry.d_tag == "DT_RPATH" else tag.runpath
                            search += str(text).split(":")
            glibc, symbol = _newest_glibc(elf)
            loads = [int(segment["p_align"]) for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
            machine = str(elf["e_machine"])
            return Elf(
                arch=_MACHINE.get(machine, machine),
                needed=tuple(needed),
                soname=soname,
                search=tuple(search),
                glibc=glibc,
                glibc_symbol=symbol,
                alignment=min(loads, default=0),
            )
    except ELFError as error:
        raise ExternalToolError(f"{path}: not a program or library: {error}") from None
    except OSError as error:
        raise ExternalToolError(f"{path}: cannot be read: {error.strerror}") from None


def _newest_glibc(elf: ELFFile) -> tuple[tuple[int, ...], str]:
    """Newest GLIBC_x.y that is needed, and the first symbol that needs it."""
    version_of: dict[int, tuple[int, ...]] = {}
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            for _, auxiliaries in section.iter_versions():
                for auxiliary in auxiliaries:
                    name = str(auxiliary.name)
                    if name.startswith("GLIBC_") and name[6:7].isdigit():
                        index = int(auxiliary["vna_other"])
                        version_of[index] = tuple(int(part) for part in name[6:].split("."))
    newest = max(version_of.values(), default=())
    symbols = elf.get_section_by_name(".dynsym")
    for section in elf.iter_sections():
        if isinstance(section, GNUVerSymSection) and symbols is not None:
            for number in range(section.num_symbols()):
                index = section.get_symbol(number)["ndx"]
                if isinstance(index, int) and version_of.get(index & 0x7FFF) == newest:
                    return newest, str(symbols.get_symbol(number).name)
    return newest, "?"


def collect(llama: LlamaCpp, target: TargetProfile, out: Path) -> RuntimeFacts:
    """Copy the programs and what they need into `out`, and inspect them.

    Raises HostError and ExternalToolError, naming the file, when the result could not run on the target, HostError for
    the disk.
    """
    wanted = _closure(llama, target)
    try:
        out.mkdir(parents=True)
        for name, source in wanted.items():
            shutil.copyfile(source, out / name)
            (out / name).chmod(0o755 if name in PROGRAMS else 0o644)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        size = sum(source.stat().st_size for source in wanted.values())
        raise HostError(
            f"{out}: no space left for the programs, {size / 2**20:.0f} MiB",
            hint="free some space there, then run again; a temporary folder is where TMPDIR says",
        ) from error
    elves = {path.name: read_elf(path) for path in sorted(out.iterdir())}
    for name, elf in elves.items():
        _check(name, elf, target, set(elves))
    check_isa(out, target, proven=llama.passed)
    _check_gpu(out, target)
    newest = max(elf.glibc for elf in elves.values())
    return RuntimeFacts(
        files=tuple(elves),
        glibc_needed=".".join(str(part) for part in newest) or "none",
        segment_alignment=min(elf.alignment for elf in elves.values()),
        bytes=sum(path.stat().st_size for path in out.iterdir()),
        compiler=_compiler(out / PROGRAMS[0]),
    )


def _compiler(path: Path) -> str:
    """The compilers named in a program's .comment section, "; " between them; "unknown" when it has none."""
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".comment")
        names = section.data().decode(errors="replace").split("\0") if section is not None else []
    return "; ".join(sorted({name for name in names if name})) or "unknown"


def _closure(llama: LlamaCpp, target: TargetProfile) -> dict[str, Path]:
    """Name in the bundle → file: the programs, ggml's backends (loaded by name at start) and all that they need."""
    folder = llama.bin
    found: dict[str, Path] = {}
    waiting = [*PROGRAMS, *sorted(path.name for path in folder.glob("libggml-*.so") if _is_backend(path))]
    while waiting:
        name = waiting.pop()
        if name in found or name in _GLIBC or name in _LOADERS or name in target.runtime.device_libraries:
            continue
        path = folder / name
        if not path.is_file() and name in COMPILER_LIBRARIES:
            own = llama.libraries / name
            path = own if own.is_file() else _compiler_library(name, target)
        if not path.is_file():
            raise HostError(
                f"{name} is not in {folder}, and the programs need it",
                hint="a bundle may need no library but glibc's own: build llama.cpp without it",
            )
        found[name] = path
        waiting += read_elf(path).needed
    return dict(sorted(found.items()))


def _is_backend(path: Path) -> bool:
    """One that is loaded by name at start has no version; where the plain name is a link, NEEDED leads to the rest."""
    return not path.is_symlink() and path.name != "libggml-base.so"


def _compiler_library(name: str, target: TargetProfile) -> Path:
    """The compiler's own copy for the target. Raises HostError."""
    compiler = shutil.which(f"{target.arch}-linux-gnu-gcc") or shutil.which("gcc") or shutil.which("cc")
    if compiler is not None:
        found = library_of(compiler, name)
        if found is not None:
            return found.resolve()
    for folder in (f"/usr/lib/{target.arch}-linux-gnu", f"/usr/{target.arch}-linux-gnu/lib", "/usr/lib64", "/usr/lib"):
        path = Path(folder, name)
        if path.is_file():
            return path.resolve()
    raise HostError(
        f"no {name} for {target.arch} on this machine", hint=f"install the g++ that builds for {target.arch}"
    )


def _check(name: str, elf: Elf, target: TargetProfile, present: set[str]) -> None:
    if elf.arch != target.arch:
        raise HostError(
            f"{name} is for {elf.arch}, the target {target.name} is {target.arch}",
            hint="build llama.cpp for the target",
        )
    floor = tuple(int(part) for part in target.runtime.glibc_floor.split("."))
    if elf.glibc > floor:
        newest = ".".join(str(part) for part in elf.glibc)
        raise HostError(
            f"{name} needs glibc {newest} (symbol {elf.glibc_symbol}), the target {target.name} has "
            f"{target.runtime.glibc_floor}",
            hint='x86-64 code is built for glibc 2.31 by runtime.cmake.CMAKE_SYSROOT = "{sysroot}" in the profile, '
            f"other code in a container of a system with glibc {target.runtime.glibc_floor} or older",
        )
    if elf.alignment < target.runtime.page_bytes:
        raise HostError(
            f"{name} is aligned to {elf.alignment} bytes, the target {target.name} may have pages of "
            f"{target.runtime.page_bytes}",
            hint="build with -Wl,-z,max-page-size=65536 in CMAKE_EXE_LINKER_FLAGS and CMAKE_SHARED_LINKER_FLAGS",
        )
    missing = sorted(set(elf.needed) - present - _GLIBC - set(_LOADERS) - set(target.runtime.device_libraries))
    if missing:
        raise HostError(
            f"{name} needs {', '.join(missing)}, which is neither in the bundle nor in glibc",
            hint="build without it; runtime.device_libraries names what a device has of its own",
        )
    outside = [entry for entry in elf.search if not _stays_inside(entry)]
    if outside:
        raise HostError(
            f"{name} looks for libraries in {', '.join(repr(entry) for entry in outside)}",
            hint="build with CMAKE_BUILD_RPATH_USE_ORIGIN = true",
        )


def _stays_inside(entry: str) -> bool:
    """Whether a search path that counts from where the programs lie in a bundle leads to somewhere in it."""
    found = _ORIGIN.fullmatch(entry)
    return found is not None and not posixpath.normpath(f"{command.PROGRAMS}{found[1] or ''}").startswith("..")


def check_isa(folder: Path, target: TargetProfile, *, proven: Path | None = None) -> None:
    """Disassemble what is in `folder` and hold it against `target.runtime.isa`.

    `proven`, a file, remembers what was looked at and passed: digests of files, and the rules. Raises HostError that
    names file, instruction and rule, or a disassembler that is missing; for a full disk as well.
    """
    isa = target.runtime.isa
    if not isa.forbidden and not isa.required:
        return
    files = [path for path in sorted(folder.iterdir()) if not _matches(path.name, isa.chosen_at_run_time)]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    passed = {"rules": isa.model_dump(mode="json"), "files": digests}
    known = _read_list(proven) if proven is not None else []
    if passed in known:
        return
    libraries = {path.name for path in files if path.name.startswith("libggml-cpu")}
    computing = libraries or set(PROGRAMS)
    for path in files:
        seen = _search_code(path, target)
        asked = [names for pattern, names in isa.asks_first.items() if _matches(path.name, (pattern,))]
        allowed = {name for names in asked for name in names}
        for name in isa.forbidden:
            if name in seen and name not in allowed:
                raise HostError(
                    f"{path.name} uses {name}, which the target {target.name} does not have: {seen[name]}",
                    hint="build for the target's processor: GGML_NATIVE = false, and its own architecture in the flags",
                )
        lost = [name for name in isa.required if name not in seen] if path.name in computing else []
        if lost:
            raise HostError(
                f"{path.name} makes no use of {lost[0]}, which the target {target.name} has",
                hint="build for the target's processor, such as by GGML_CPU_ARM_ARCH",
            )
    if proven is not None:
        try:
            write_atomic(proven, json.dumps([*known, passed]) + "\n")
        except OSError as error:
            if error.errno in _FULL:
                raise HostError(f"{proven}: no space left", hint="free some space, then run again") from error
            return  # a cache that is not ours to write: it is looked at again the next time


def _read_list(path: Path) -> list[object]:
    """What is in the file; nothing where there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _check_gpu(folder: Path, target: TargetProfile) -> None:
    """The GPU backend that is promised is there, and every `target.runtime.gpu_code` in some file. Raises HostError."""
    promised = target.runtime.backend == "CUDA"
    if not promised and not target.runtime.gpu_code:
        return
    files = sorted(folder.iterdir())
    held = {code for path in files for code in fatbin.code_in(path)}
    # Linked statically, the backend is no library: its code is in the programs.
    if promised and not held and not any(path.name.startswith("libggml-cuda.so") for path in files):
        raise HostError(
            f"no CUDA backend (libggml-cuda) in what is built for {target.name}, whose runtime.backend is CUDA",
            hint='build with GGML_CUDA = true, or give the profile runtime.backend = "CPU"',
        )
    missing = [code for code in target.runtime.gpu_code if code not in held]
    if missing:
        raise HostError(
            f"no {', '.join(missing)} code in the programs for {target.name}, only {', '.join(sorted(held)) or 'none'}",
            hint=f'build with GGML_CUDA = true and CMAKE_CUDA_ARCHITECTURES = "{missing[0][3:]}-real"',
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _search_code(path: Path, target: TargetProfile) -> dict[str, str]:
    """Rule → the first line of the disassembly that matches it."""
    wanted = {**target.runtime.isa.forbidden, **target.runtime.isa.required}
    patterns = {name: re.compile(pattern, re.MULTILINE) for name, pattern in wanted.items()}
    left_out = _ranges(path, target.runtime.isa.dispatched)
    found: dict[str, str] = {}
    argv = [_objdump(target), "--disassemble", "--no-show-raw-insn", str(path)]
    said = ""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None
        while text := child.stdout.read(_OBJDUMP_BYTES):
            text += child.stdout.readline()
            for name, pattern in patterns.items():
                if name not in found and (line := _first_line(pattern, text, left_out)):
                    found[name] = line
            said = text.strip().rpartition("\n")[2]
    if child.returncode:
        raise ExternalToolError(f"{argv[0]} cannot read {path}: {said}")
    return found


def _first_line(pattern: re.Pattern[str], text: str, left_out: list[range]) -> str | None:
    """The first instruction of a disassembly that `pattern` matches at an address that is not `left_out`."""
    for match in pattern.finditer(text):
        start, end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
        if not _INSTRUCTION.match(text, start):
            continue
        line = " ".join(text[start:end].split())
        address = line.partition(":")[0]
        if not any(int(address, 16) in addresses for addresses in left_out):
            return line
    return None


def _ranges(path: Path, names: tuple[str, ...]) -> list[range]:
    """Where the functions called `names` lie, by the symbols that the file has kept."""
    if not names:
        return []
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        symbols = [] if table is None else [symbol for symbol in table.iter_symbols() if _matches(symbol.name, names)]
        return [range(symbol["st_value"], symbol["st_value"] + symbol["st_size"]) for symbol in symbols]


def _objdump(target: TargetProfile) -> str:
    for name in (f"{target.arch}-linux-gnu-objdump", "objdump" if platform.machine() == target.arch else None):
        if name is not None and shutil.which(name) is not None:
            return name
    package = f"binutils-{target.arch.replace('_', '-')}-linux-gnu"
    raise HostError(
        f"no disassembler for {target.arch}, and these programs have not been held against the rules of {target.name}",
        hint=f"apt-get install {package}; or, in a container, mount a cache in which `toolchain runtime build "
        f"--target {target.name}` was run: what has passed there is remembered",
    )
