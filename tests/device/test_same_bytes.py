"""Parts of the pinned llama.cpp, compiled twice with a target's own options in different surroundings: the same bytes.

The whole of it: `toolchain runtime build --target TARGET --twice`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toolchain.gguf import llama_cpp
from toolchain.reporter import Silent

pytestmark = pytest.mark.device
BUILD = """
import sys
from pathlib import Path
from toolchain.gguf import llama_cpp
from toolchain.reporter import Silent
from toolchain.target import read_target

target, folder, *wanted = sys.argv[1:]
options = read_target(target).runtime.cmake
llama_cpp.compiled(options, Path(folder), wanted=wanted, log=Path(folder, "log"), report=Silent())
"""


def compiled(target: str, folder: Path, *wanted: str, umask: str, **environment: str) -> dict[str, str]:
    """Path → SHA-256 of every object and library that was made."""
    folder.mkdir(parents=True)
    argv = ["sh", "-c", f'umask {umask}; exec "$@"', "sh", sys.executable, "-c", BUILD, target, str(folder), *wanted]
    ran = subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    objects = folder / "build"
    return {
        path.relative_to(objects).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in objects.rglob("*")
        if path.is_file() and "CompilerId" not in str(path) and (path.suffix in (".o", ".a") or ".so" in path.name)
    }


@pytest.mark.parametrize(
    ("target", "library"), [("x86-cpu", "bin/libggml-base.so.0.25.3"), ("rpi5", "ggml/src/libggml-base.a")]
)
def test_another_folder_day_umask_and_locale_give_the_same_bytes(target: str, library: str, tmp_path: Path) -> None:
    if target == "rpi5" and shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("needs g++-aarch64-linux-gnu")
    llama_cpp.fetch(report=Silent())
    wanted = (library, "common/CMakeFiles/llama-common-base.dir/build-info.cpp.o")
    first = compiled(target, tmp_path / "a", *wanted, umask="022", LC_ALL="C.UTF-8", TZ="UTC")
    # As where git is not there, or finds that the files are somebody else's.
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\nexit 128\n")
    git.chmod(0o755)
    surroundings = {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PATH": f"{git.parent}:{os.environ['PATH']}"}
    # What a developer may have set for something else.
    (tmp_path / "stdio.h").write_text("#error not meant for this build\n")
    surroundings |= {"CPATH": str(tmp_path), "CFLAGS": "-march=native", "CXXFLAGS": "-O0"}
    surroundings["CMAKE_TOOLCHAIN_FILE"] = str(tmp_path / "none.cmake")
    second = compiled(target, tmp_path / "another" / "deeper", *wanted, umask="077", **surroundings)
    assert first.keys() == second.keys() >= set(wanted)
    assert [name for name, digest in first.items() if digest != second[name]] == []
