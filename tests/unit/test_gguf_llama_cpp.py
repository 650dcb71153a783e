"""Building, caching and finding llama.cpp, with a small CMake project of the same shape in its place."""

import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from toolchain import errors
from toolchain.gguf import llama_cpp, pinned
from toolchain.reporter import Silent
from toolchain.target import read_target

CMAKELISTS = """\
cmake_minimum_required(VERSION 3.14)
project(small C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(llama SHARED ${CMAKE_CURRENT_SOURCE_DIR}/lib.c)
set_target_properties(llama PROPERTIES VERSION 0.5.0 SOVERSION 0)
add_library(ggml-cpu-x64 MODULE lib.c)
add_library(ggml-cpu-sapphirerapids MODULE lib.c)
foreach(name llama-server llama-bench llama-quantize llama-imatrix extra)
  add_executable(${name} main.c)
  target_link_libraries(${name} llama)
endforeach()
add_dependencies(llama-server ggml-cpu-x64 ggml-cpu-sapphirerapids)
"""

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("c++") is None, reason="no C and C++ compiler"
)


class Lines(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.spoke = threading.Event()

    def line(self, text: str) -> None:
        self.said.append(text)
        self.spoke.set()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_source(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small project as a source distribution, pinned and already downloaded."""
    top = tmp_path / "llama_cpp_python-9"
    tree = top / "vendor" / "llama.cpp"
    for folder in (tree / "conversion", tree / "licenses", tree / "gguf-py" / "gguf", top / "llama_cpp" / "server"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (tree / "CMakeLists.txt").write_text(CMAKELISTS)
    (tree / "lib.c").write_text("const char *where(void) { return __FILE__; }\n")
    (tree / "main.c").write_text(
        '#include <stdio.h>\nconst char *where(void);\nint main(void) { printf("%s\\n", where()); return 0; }\n'
    )
    for file in (tree / "convert_hf_to_gguf.py", tree / "LICENSE", top / "LICENSE.md"):
        file.write_text("text\n")
    archive = cache / "downloads" / "llama_cpp_python-9.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(top, arcname=top.name)
    pin = {
        "package": "llama-cpp-python",
        "version": "9",
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "commit": "0123abc",
    }
    monkeypatch.setattr(llama_cpp, "versions", lambda: {"llama_cpp": pin})
    patches = tmp_path / "patches"
    patches.mkdir()
    monkeypatch.setattr(llama_cpp, "_PATCHES", patches)
    return archive


@needs_compiler
def test_a_build_is_made_once_found_again_and_holds_no_path_of_this_machine(
    small_source: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"CMAKE_BUILD_RPATH_USE_ORIGIN": True}
    built = llama_cpp.build(options, report=Silent())
    log = cache / "llama.cpp" / f"{built.key}.log"
    size = log.stat().st_size
    assert llama_cpp.build(options, report=Silent()) == llama_cpp.find(options) == built
    assert log.stat().st_size == size
    assert not list(cache.glob("llama.cpp/*.partial"))
    assert built.commit == "0123abc"
    assert built.root.name == built.digest == built.key
    moved = shutil.move(built.root, tmp_path / "elsewhere")
    answer = subprocess.run([Path(moved) / "bin" / "llama-server"], capture_output=True, text=True, check=True, env={})
    assert answer.stdout == "./vendor/llama.cpp/lib.c\n"


@needs_compiler
def test_an_installed_build_has_programs_libraries_sources_and_bindings_and_no_more(small_source: Path) -> None:
    built = llama_cpp.build({"CMAKE_BUILD_RPATH_USE_ORIGIN": True}, report=Silent())
    programs = {"llama-server", "llama-bench", "llama-quantize", "llama-imatrix"}
    assert {path.name for path in built.bin.iterdir()} == programs | {
        "libllama.so",
        "libllama.so.0",
        "libggml-cpu-x64.so",
    }
    assert (built.bin / "libllama.so").readlink() == Path("libllama.so.0")
    assert b"$ORIGIN\0" in (built.bin / "llama-server").read_bytes()
    assert b"$ORIGIN:" not in (built.bin / "llama-server").read_bytes()
    assert built.converter.is_file()
    assert built.licence.is_file()
    assert [path.name for path in (built.bindings / "llama_cpp").iterdir()] == []
    with pytest.raises(errors.HostError, match="llama-cli"):
        built.program("llama-cli")


@needs_compiler
def test_a_bundle_made_on_another_machine_has_the_libraries_of_the_one_that_built(
    small_source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As jetson-orin's, which is built in a container: no cross compiler, and named by its processor."""
    pytest.importorskip("elftools")
    from toolchain.bundle import runtime

    machine = platform.machine()
    options: dict[str, str | bool] = {
        "CMAKE_BUILD_RPATH_USE_ORIGIN": True,
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_SHARED_LINKER_FLAGS": "-Wl,--no-as-needed -lstdc++ -lgcc_s",
    }
    profile = tmp_path / "board.toml"
    profile.write_text(
        f'name = "board"\ndescription = "made up"\narch = "{machine}"\n[runtime]\nbackend = "CPU"\n'
        'glibc_floor = "9.9"\n[runtime.cmake]\n'
    )
    built = llama_cpp.build(options, report=Silent())
    assert {path.name for path in built.libraries.iterdir()} == {"libstdc++.so.6", "libgcc_s.so.1"}
    # What is here now must make no difference.
    with (built.libraries / "libstdc++.so.6").open("ab") as file:
        file.write(b"the builder's")
    monkeypatch.setenv("PATH", "/nowhere")
    runtime.collect(built, read_target(str(profile)), tmp_path / "bin")
    assert (tmp_path / "bin" / "libstdc++.so.6").read_bytes().endswith(b"the builder's")


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_native_programs_are_stripped_even_where_their_processor_is_named(small_source: Path) -> None:
    built = llama_cpp.build({"CMAKE_SYSTEM_PROCESSOR": platform.machine()}, report=Silent())
    asked = subprocess.run(["nm", built.program("llama-server")], capture_output=True, text=True, check=False)
    assert "no symbols" in asked.stderr
    assert not built.libraries.exists()


@needs_compiler
def test_a_build_is_unpacked_by_a_python_that_has_no_filters_for_tar(
    small_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3.11.2, as Debian 12 has it, or 3.11.0, as Ubuntu 22.04."""
    newer = tarfile.TarFile.extractall

    def older(self: tarfile.TarFile, path: Path, members: None = None, *, numeric_owner: bool = False) -> None:
        newer(self, path, members, numeric_owner=numeric_owner, filter="data")

    monkeypatch.setattr(tarfile.TarFile, "extractall", older)
    monkeypatch.delattr(tarfile, "data_filter")
    assert llama_cpp.build({}, report=Silent()).program("llama-server").is_file()


@needs_compiler
def test_other_options_are_another_build(small_source: Path) -> None:
    one = llama_cpp.build({}, report=Silent())
    with pytest.raises(errors.HostError, match="not built with these options"):
        llama_cpp.find({"GGML_NATIVE": True})
    two = llama_cpp.build({"GGML_NATIVE": True}, report=Silent())
    assert one.key != two.key
    assert llama_cpp.find({}) == one


PATCH = """\
What it is for.

--- a/main.c
+++ b/main.c
@@ -1,3 +1,3 @@
 #include <stdio.h>
 const char *where(void);
-int main(void) { printf("%s\\n", where()); return 0; }
+int main(void) { printf("patched\\n"); return 0; }
"""


@needs_compiler
def test_a_patch_is_built_in_and_makes_another_build(small_source: Path, tmp_path: Path) -> None:
    options = {"CMAKE_BUILD_RPATH_USE_ORIGIN": True}
    plain = llama_cpp.build(options, report=Silent())
    (tmp_path / "patches" / "0001-main.patch").write_text(PATCH)
    with pytest.raises(errors.HostError, match="not built with these options"):
        llama_cpp.find(options)
    patched = llama_cpp.build(options, report=Silent())
    said = [subprocess.check_output([build.program("llama-server")], text=True) for build in (plain, patched)]
    assert said[0].endswith("lib.c\n")
    assert said[1] == "patched\n"


@needs_compiler
@pytest.mark.parametrize(
    "text",
    [PATCH.replace(" const char", " const  char"), PATCH.replace("main.c", "other.c"), PATCH[:60], ""],
    ids=["another source", "no such file", "cut", "empty"],
)
def test_a_patch_that_does_not_fit_is_named_and_nothing_is_built(
    small_source: Path, tmp_path: Path, cache: Path, text: str
) -> None:
    here = Path.cwd()
    (tmp_path / "patches" / "0001-main.patch").write_text(text)
    with pytest.raises(errors.HostError, match=r"0001-main\.patch does not fit .* llama-cpp-python 9") as caught:
        llama_cpp.build({}, report=Silent())
    assert "versions.toml" in (caught.value.hint or "")
    assert Path.cwd() == here
    assert not list(cache.glob("llama.cpp/*/build.json"))


@needs_compiler
def test_a_build_by_another_compiler_is_used_when_there_is_no_own(
    small_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = llama_cpp.build({}, report=Silent())
    monkeypatch.setattr(llama_cpp, "_compiler_line", lambda cmake: None)
    assert llama_cpp.find({}) == built


@needs_compiler
def test_a_broken_build_fails_and_the_next_goes_on_where_it_stopped(small_source: Path, cache: Path) -> None:
    request = llama_cpp._request({})
    compiler = llama_cpp._compiler_line({})
    assert compiler is not None
    partial = cache / "llama.cpp" / f"{llama_cpp._key(request, compiler)}.partial"
    tree = llama_cpp._unpack(small_source, partial / "sdist") / "vendor" / "llama.cpp"
    whole = (tree / "main.c").read_text()
    (tree / "main.c").write_text("#error cut off\n")
    with pytest.raises(errors.ExternalToolError, match="ninja exited with 1"):
        llama_cpp.build({}, report=Silent())
    with pytest.raises(errors.HostError, match="not built"):
        llama_cpp.find({})
    (tree / "main.c").write_text(whole)
    log = cache / "llama.cpp" / f"{llama_cpp._key(request, compiler)}.log"
    before = len(log.read_text())
    llama_cpp.build({}, report=Silent())
    assert "main.c" in log.read_text()[before:]
    assert "Building C object CMakeFiles/llama.dir" not in log.read_text()[before:]


@needs_compiler
def test_a_second_builder_says_that_it_waits_and_takes_the_first_ones_build(small_source: Path, cache: Path) -> None:
    built = llama_cpp.build({}, report=Silent())
    report = Lines()
    found: list[llama_cpp.LlamaCpp] = []
    with pinned.lock(cache / "llama.cpp" / f"{built.key}.lock", Silent(), doing="building this llama.cpp"):
        second = threading.Thread(target=lambda: found.append(llama_cpp.build({}, report=report)))
        second.start()
        assert report.spoke.wait(20)
        assert found == []
    second.join(20)
    assert found == [built]
    assert report.said == ["another process is building this llama.cpp: waiting for it"]


def test_a_source_archive_with_another_digest_is_refused(small_source: Path) -> None:
    small_source.write_bytes(small_source.read_bytes() + b"x")
    with pytest.raises(errors.HostError, match="SHA-256 is"):
        llama_cpp.fetch()


def test_a_missing_compiler_is_named_with_what_installs_one(cache: Path) -> None:
    with pytest.raises(errors.HostError, match="no-such-cc") as caught:
        llama_cpp.build({"CMAKE_C_COMPILER": "no-such-cc"}, report=Silent())
    assert caught.value.hint == "apt-get install build-essential"


@pytest.mark.parametrize(
    ("target", "names", "hint"),
    [
        ("rpi5", {}, "apt-get install gcc-aarch64-linux-gnu g++-aarch64-linux-gnu libc6-dev-arm64-cross"),
        (
            "rpi5",
            {"CMAKE_C_COMPILER": "x86_64-linux-gnu-gcc", "CMAKE_CXX_COMPILER": "x86_64-linux-gnu-g++"},
            "apt-get install gcc-x86-64-linux-gnu g++-x86-64-linux-gnu libc6-dev-amd64-cross",
        ),
        ("rpi5", {"CMAKE_C_COMPILER": "own-cc"}, "put them on PATH, or name others"),
        ("jetson-orin", {}, "apt-get install build-essential"),
    ],
)
def test_a_missing_cross_compiler_is_named_by_its_packages(
    monkeypatch: pytest.MonkeyPatch, target: str, names: dict[str, str], hint: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    error = llama_cpp._no_compiler({**read_target(target).runtime.cmake, **names})
    assert str(error.hint).startswith(hint)


@pytest.mark.parametrize("variable", ["TOOLCHAIN_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("below", ["", "deep/down"])
def test_a_cache_that_cannot_be_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, below: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("TOOLCHAIN_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file" / below))
    for call in (llama_cpp.find, lambda cmake: llama_cpp.build(cmake, report=Silent())):
        with pytest.raises(errors.HostError, match=f"{variable}: .*file is a file") as caught:
            call({})
        assert "TOOLCHAIN_CACHE" in str(caught.value.hint)


@needs_compiler
def test_a_cache_that_cannot_be_made_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE", "/proc/cache")
    with pytest.raises(errors.HostError, match=r"/proc/cache/llama\.cpp: cannot be made") as caught:
        llama_cpp.build({}, report=Silent())
    assert "TOOLCHAIN_CACHE" in str(caught.value.hint)


def test_a_missing_build_is_an_error_that_names_the_verb(cache: Path) -> None:
    with pytest.raises(errors.HostError) as caught:
        llama_cpp.find({})
    assert "toolchain llama-cpp build" in str(caught.value.hint)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TOOLCHAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert llama_cpp.cache_folder() == tmp_path / "xdg" / "toolchain"
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "own"))
    assert llama_cpp.cache_folder() == tmp_path / "own"


def test_a_target_overrules_a_shared_flag_and_booleans_become_cmakes() -> None:
    flags = llama_cpp.flags_of({"GGML_NATIVE": False, "CMAKE_BUILD_TYPE": "Debug", "BUILD_SHARED_LIBS": True})
    assert "-DGGML_NATIVE=OFF" in flags
    assert "-DBUILD_SHARED_LIBS=ON" in flags
    assert [flag for flag in flags if "BUILD_TYPE" in flag] == ["-DCMAKE_BUILD_TYPE=Debug"]


def test_pip_takes_only_the_source_that_is_pinned() -> None:
    argv = pinned.pip_argv(Path("wanted.txt"), Path("out"), ["--no-binary=:all:"])
    assert argv[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-binary=:all:", "--require-hashes"} <= set(argv)


def test_there_is_a_physical_core() -> None:
    assert llama_cpp.physical_cores() >= 1
