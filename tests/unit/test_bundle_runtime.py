"""Reading what a program asks of the machine it runs on."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("elftools")

from toolchain.bundle import runtime
from toolchain.errors import ExternalToolError, HostError
from toolchain.target import read_target

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
@pytest.mark.parametrize("entry", ["/opt/lib", "$ORIGIN:"])
def test_a_search_path_outside_the_bundle_is_refused(tmp_path: Path, entry: str) -> None:
    elf = runtime.read_elf(compile_program(tmp_path, f"-Wl,-rpath,{entry}"))
    target = read_target("x86-cpu").model_copy(update={"arch": platform.machine()})
    target = target.model_copy(update={"runtime": target.runtime.model_copy(update={"glibc_floor": "9.9"})})
    with pytest.raises(HostError, match="a looks for libraries in"):
        runtime._check("a", elf, target, set())


def test_a_text_is_not_a_program(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("#!/bin/sh\n")
    with pytest.raises(ExternalToolError, match="not a program or library"):
        runtime.read_elf(path)
