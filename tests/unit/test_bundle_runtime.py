"""Reading what a program asks of the machine it runs on."""

import errno
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.device import bundles

pytest.importorskip("elftools")

from toolchain.bundle import runtime
from toolchain.errors import ExternalToolError, HostError
from toolchain.target import TargetProfile, read_target

gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


def compile_program(tmp_path: Path, *options: str) -> Path:
    source = tmp_path / "a.c"
    source.write_text('#include <math.h>\n#include <stdio.h>\nint main(int n, char **v) { printf("%f", exp(n)); }\n')
    program = tmp_path / "a"
    subprocess.run(["gcc", str(source), "-o", str(program), "-lm", *options], check=True)
    return program


@gcc
def test_needed_libraries_versions_and_search_path_are_read(tmp_path: Path) -> None:
    elf = runtime.read_elf(compile_program(tmp_path, "-Wl,-rpath,$ORIGIN:/opt/lib", "-Wl,-z,max-page-size=65536"))
    assert elf.arch == platform.machine()
    assert set(elf.needed) == {"libm.so.6", "libc.so.6"}
    assert elf.search == ("$ORIGIN", "/opt/lib")
    assert elf.alignment == 65536
    assert elf.glibc >= (2, 2)
    assert elf.glibc_symbol in ("exp", "__libc_start_main")


@gcc
@pytest.mark.parametrize(
    "entry", ["/opt/lib", "$ORIGIN:", "$ORIGIN/../../..", "$ORIGIN:$ORIGIN/../../../lib", "$ORIGINAL"]
)
def test_a_search_path_outside_the_bundle_is_refused(tmp_path: Path, entry: str) -> None:
    elf = runtime.read_elf(compile_program(tmp_path, f"-Wl,-rpath,{entry}"))
    target = read_target("x86-cpu").model_copy(update={"arch": platform.machine()})
    target = target.model_copy(update={"runtime": target.runtime.model_copy(update={"glibc_floor": "9.9"})})
    with pytest.raises(HostError, match="a looks for libraries in"):
        runtime._check("a", elf, target, set())


@pytest.mark.parametrize("entry", ["$ORIGIN", "${ORIGIN}/", "$ORIGIN/../lib", "$ORIGIN/../.."])
def test_a_search_path_inside_the_bundle_is_none_to_refuse(entry: str) -> None:
    assert runtime._stays_inside(entry)


@gcc
def test_programs_for_a_newer_glibc_are_refused_with_what_builds_for_an_older_one(tmp_path: Path) -> None:
    elf = runtime.read_elf(compile_program(tmp_path))
    target = host(tmp_path)
    target = target.model_copy(update={"runtime": target.runtime.model_copy(update={"glibc_floor": "2.1"})})
    with pytest.raises(HostError, match=r"a needs glibc .*, the target fourth has 2\.1") as caught:
        runtime._check("a", elf, target, set())
    assert 'CMAKE_SYSROOT = "{sysroot}"' in str(caught.value.hint)
    assert "container of a system with glibc 2.1" in str(caught.value.hint)


def test_a_text_is_not_a_program(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("#!/bin/sh\n")
    with pytest.raises(ExternalToolError, match="not a program or library"):
        runtime.read_elf(path)


def host(tmp_path: Path, **isa: dict[str, str]) -> TargetProfile:
    """A made-up profile for this host's processor, from a file of its own."""
    rules = "".join(
        f"[runtime.isa.{kind}]\n" + "".join(f"{json.dumps(name)} = '{rule}'\n" for name, rule in found.items())
        for kind, found in isa.items()
    )
    (tmp_path / "fourth.toml").write_text(
        f'name = "fourth"\ndescription = "made up"\narch = "{platform.machine()}"\n'
        f'[runtime]\nbackend = "CPU"\nglibc_floor = "9.9"\npage_bytes = 16384\n[runtime.cmake]\n{rules}'
    )
    return read_target(str(tmp_path / "fourth.toml"))


@gcc
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX is x86's")
def test_an_instruction_that_the_target_lacks_is_found_and_shown(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    source = tmp_path / "b.c"
    source.write_text("void add(float *a) { for (int i = 0; i < 64; i++) a[i] += 1; }\nint main(void) { return 0; }\n")
    target = host(tmp_path, forbidden={"AVX": "%[yz]mm[0-9]"})
    for options, name in (([], "plain"), (["-mavx"], "avx")):
        subprocess.run(["gcc", "-O3", *options, str(source), "-o", str(tmp_path / "bin" / name)], check=True)
        if name == "plain":
            runtime.check_isa(tmp_path / "bin", target)
    with pytest.raises(HostError, match=r"avx uses AVX, which the target fourth does not have: .*%ymm"):
        runtime.check_isa(tmp_path / "bin", target)


@gcc
def test_programs_without_the_kernels_that_the_target_wants_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "llama-server")
    with pytest.raises(HostError, match="llama-server makes no use of the dot product"):
        runtime.check_isa(tmp_path / "bin", host(tmp_path, required={"the dot product": "\\bvpdpbusd\\b"}))


@gcc
def test_what_was_looked_at_and_passed_is_not_looked_at_again_until_it_changes(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "a")
    proven = tmp_path / "isa.json"
    target = host(tmp_path, forbidden={"nothing": "no such text"})
    runtime.check_isa(tmp_path / "bin", target, proven=proven)
    assert proven.is_file()
    other = host(tmp_path, forbidden={"returning": "\\bret"})
    with pytest.raises(HostError, match="a uses returning"):
        runtime.check_isa(tmp_path / "bin", other, proven=proven)


@gcc
def test_names_of_folders_and_functions_are_no_instructions(tmp_path: Path) -> None:
    folder = tmp_path / "p1" / "z2.0"
    folder.mkdir(parents=True)
    compile_program(tmp_path).rename(folder / "a")
    target = host(tmp_path, forbidden={"SVE": r"\b[zp][0-9]+[./]", "a function": "^[0-9a-f]+ <main>:"})
    for dispatched in ((), ("main",)):
        isa = target.runtime.isa.model_copy(update={"dispatched": dispatched})
        changed = target.model_copy(update={"runtime": target.runtime.model_copy(update={"isa": isa})})
        runtime.check_isa(folder, changed)


@gcc
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]"])
def test_a_damaged_record_of_what_passed_is_none(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "a")
    proven = tmp_path / "isa.json"
    proven.write_bytes(damage)
    runtime.check_isa(tmp_path / "bin", host(tmp_path, forbidden={"nothing": "no such text"}), proven=proven)
    assert json.loads(proven.read_text())["files"]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@gcc
def test_a_full_disk_leaves_the_record_of_what_passed_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    compile_program(tmp_path).rename(tmp_path / "bin" / "a")
    (tmp_path / "cache").mkdir()
    proven = tmp_path / "cache" / "isa.json"
    proven.write_text("{}")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(HostError, match=r"isa\.json: no space left") as caught:
        runtime.check_isa(tmp_path / "bin", host(tmp_path, forbidden={"nothing": "no such text"}), proven=proven)
    assert caught.value.hint
    assert [(path.name, path.read_text()) for path in proven.parent.iterdir()] == [("isa.json", "{}")]


def test_a_full_disk_below_the_copies_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = bundles.install(tmp_path / "llama")
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(HostError, match=r"out: no space left for the programs, \d+ MiB") as caught:
        runtime.collect(llama, bundles.target(), tmp_path / "out")
    assert "TMPDIR" in str(caught.value.hint)


@gcc
def test_programs_that_large_pages_cannot_map_are_refused(tmp_path: Path) -> None:
    elf = runtime.read_elf(compile_program(tmp_path, "-Wl,-z,max-page-size=4096"))
    with pytest.raises(HostError, match="a is aligned to 4096 bytes, the target fourth may have pages of 16384"):
        runtime._check("a", elf, host(tmp_path), set())
