"""Kernels of the pinned llama.cpp for a Jetson Orin, compiled on this host by the toolkit of NVIDIA's wheels."""

import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from toolchain.bundle import fatbin
from toolchain.errors import ExternalToolError
from toolchain.gguf import cuda_toolkit, llama_cpp
from toolchain.reporter import Silent
from toolchain.target import read_target

pytestmark = pytest.mark.device
KERNELS = ("scale", "norm", "rope")
WITH_NAMES_OF_ITS_OWN = "ssm-scan"
"""Symbols of its unnamed namespaces hold a checksum of where its source lies, as nvcc names them."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(llama_cpp.fetch()) as archive:
        for member in archive:
            if "/vendor/llama.cpp/ggml/" in member.name:
                archive.extract(member, folder, filter="data")
    (top,) = folder.iterdir()
    return top / "vendor" / "llama.cpp" / "ggml"


needs_compiler = pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu")


def compile_kernel(source: Path, kernel: str, out: Path) -> None:
    toolkit = cuda_toolkit.make(llama_cpp.cache_folder(), report=Silent())
    argv = [str(toolkit / "bin" / "nvcc"), "-ccbin", "aarch64-linux-gnu-g++", "-std=c++17", "-O3", "-use_fast_math"]
    argv += ["-extended-lambda", "-gencode", "arch=compute_87,code=sm_87", "-DGGML_CUDA_NO_VMM"]
    argv += [f"-Xcompiler=-ffile-prefix-map={source}=."]  # as in a build
    argv += [f"-I{source / 'include'}", f"-I{source / 'src'}", "-c", str(source / "src" / "ggml-cuda" / f"{kernel}.cu")]
    compiled = subprocess.run([*argv, "-o", str(out)], capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-2000:]


@needs_compiler
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_compiled_for_the_orin(source: Path, tmp_path: Path, kernel: str) -> None:
    out = tmp_path / f"{kernel}.o"
    compile_kernel(source, kernel, out)
    assert fatbin.code_in(out) == {"sm_87"}
    with out.open("rb") as file:
        assert ELFFile(file)["e_machine"] == "EM_AARCH64"


@needs_compiler
def test_what_is_set_for_other_builds_does_not_get_into_one_for_the_orin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CUDAHOSTCXX": "g++", "NVCC_CCBIN": "g++", "NVCC_APPEND_FLAGS": "-arch=sm_75"}.items():
        monkeypatch.setenv(name, value)
    options = read_target("jetson-orin-jp7").runtime.cmake
    kernel = "ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir/scale.cu.o"
    _, objects = llama_cpp.compiled(options, tmp_path, wanted=[kernel], log=tmp_path / "log", report=Silent())
    assert fatbin.code_in(objects / kernel) == {"sm_87"}


def test_nvcc_takes_the_compiler_on_path_where_the_profile_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in NVIDIA's image; here the last step of CMake's check fails, as the toolkit has no libraries for x86-64."""
    monkeypatch.setenv("CUDACXX", str(cuda_toolkit.make(llama_cpp.cache_folder(), report=Silent()) / "bin" / "nvcc"))
    monkeypatch.setenv("NVCC_CCBIN", "nobodys-g++")
    options = read_target(str(Path(__file__).with_name("x86-cuda.toml"))).runtime.cmake
    log = tmp_path / "log"
    with pytest.raises(ExternalToolError):
        llama_cpp.compiled(options, tmp_path, wanted=["llama-server"], log=log, report=Silent())
    said = log.read_text()
    assert re.search(r'#\$ ptxas .*\n.*\.cubin"', said)
    assert "cannot find -lcudart" in said


@needs_compiler
def test_a_kernel_is_the_same_from_a_folder_of_another_name(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "vendor" / "llama.cpp" / "ggml"
    shutil.copytree(source, other)
    made: list[bytes] = []
    for folder in (source, other):
        out = tmp_path / f"{len(made)}.o"
        compile_kernel(folder, WITH_NAMES_OF_ITS_OWN, out)
        # What is left out when a build is installed: the names of nvcc's temporary files.
        subprocess.run(["aarch64-linux-gnu-strip", "--strip-unneeded", str(out)], check=True)
        made.append(out.read_bytes())
    assert made[0] == made[1]
