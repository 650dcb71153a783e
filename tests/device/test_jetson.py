"""Kernels of the pinned llama.cpp for a Jetson Orin, compiled on this host by the toolkit of NVIDIA's wheels."""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from toolchain.bundle import fatbin
from toolchain.gguf import cuda_toolkit, llama_cpp
from toolchain.reporter import Silent

pytestmark = pytest.mark.device
KERNELS = ("scale", "norm", "rope")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(llama_cpp.fetch()) as archive:
        for member in archive:
            if "/vendor/llama.cpp/ggml/" in member.name:
                archive.extract(member, folder, filter="data")
    (top,) = folder.iterdir()
    return top / "vendor" / "llama.cpp" / "ggml"


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_compiled_for_the_orin(source: Path, tmp_path: Path, kernel: str) -> None:
    toolkit = cuda_toolkit.make(llama_cpp.cache_folder(), report=Silent())
    out = tmp_path / f"{kernel}.o"
    argv = [str(toolkit / "bin" / "nvcc"), "-ccbin", "aarch64-linux-gnu-g++", "-std=c++17", "-O3", "-use_fast_math"]
    argv += ["-extended-lambda", "-gencode", "arch=compute_87,code=sm_87", "-DGGML_CUDA_NO_VMM"]
    argv += [f"-I{source / 'include'}", f"-I{source / 'src'}", "-c", str(source / "src" / "ggml-cuda" / f"{kernel}.cu")]
    compiled = subprocess.run([*argv, "-o", str(out)], capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    assert fatbin.code_in(out) == {"sm_87"}
    with out.open("rb") as file:
        assert ELFFile(file)["e_machine"] == "EM_AARCH64"
