"""What a library holds for which GPU, and the toolkit that makes it, put together from wheels."""

import hashlib
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("elftools")

from tests.device import bundles
from toolchain.bundle import fatbin, runtime
from toolchain.errors import HostError
from toolchain.gguf import cuda_toolkit
from toolchain.reporter import Silent

FRONT_END = '#!/bin/sh\nprintf "%s\\n" "$@"\n'


def entry(kind: int, architecture: int, payload: bytes = b"\1" * 24) -> bytes:
    head = struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(payload), 0, 0, 0, 0, architecture)
    return head.ljust(64, b"\0") + payload


def fat(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_machine_code_and_listings_of_every_fat_binary_are_found() -> None:
    data = fat(entry(2, 87), entry(1, 75)) + bytes(40) + fat(entry(2, 90, b""))
    assert fatbin.codes(data) == {"sm_87", "compute_75", "sm_90"}


@pytest.mark.parametrize("data", [b"", b"\x50\xed\x55\xba", fat(entry(2, 87))[:30], fat(b"\0" * 64), b"\xff" * 999])
def test_what_is_cut_short_or_no_fat_binary_holds_nothing(data: bytes) -> None:
    assert fatbin.codes(data) == set()


def test_programs_without_the_gpus_code_are_refused_with_the_option_that_makes_it(tmp_path: Path) -> None:
    llama = bundles.install(tmp_path / "llama")
    with pytest.raises(HostError, match=r"no sm_87 code in the programs for x86-cpu, only none") as caught:
        runtime.collect(llama, bundles.target(gpu_code=("sm_87",)), tmp_path / "out")
    assert caught.value.hint == 'build with GGML_CUDA = true and CMAKE_CUDA_ARCHITECTURES = "87-real"'


@pytest.mark.parametrize("gpu_code", [(), ("sm_87",)])
def test_a_profile_that_promises_cuda_wants_its_backend_built(tmp_path: Path, gpu_code: tuple[str, ...]) -> None:
    llama = bundles.install(tmp_path / "llama")
    target = bundles.target(backend="CUDA", gpu_code=gpu_code)
    with pytest.raises(HostError, match=r"no CUDA backend \(libggml-cuda\) in what is built for x86-cpu") as caught:
        runtime.collect(llama, target, tmp_path / "out")
    assert "GGML_CUDA = true" in str(caught.value.hint)


def test_a_library_of_the_backend_is_one(tmp_path: Path) -> None:
    llama = bundles.install(tmp_path / "llama")
    (llama.bin / "libggml-cuda.so").write_bytes((llama.bin / "llama-bench").read_bytes())
    facts = runtime.collect(llama, bundles.target(backend="CUDA"), tmp_path / "out")
    assert "libggml-cuda.so" in facts.files


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two small wheels in the place of NVIDIA's; whatever is to be fetched is copied from there."""
    contents = {
        "compiler": {"bin/nvcc": "#!/bin/sh\n", "bin/cudafe++": FRONT_END, "include/a.h": ""},
        "library": {"include/b.h": "", "lib/libb.so.13": "b", "lib/libheavy.so.13": "heavy", "../../out": "no"},
    }
    made: dict[str, Path] = {}
    pins: list[dict[str, Any]] = []
    for name, files in contents.items():
        made[name] = tmp_path / f"{name}-1-py3-none-any.whl"
        with zipfile.ZipFile(made[name], "w") as archive:
            for path, text in files.items():
                archive.writestr(f"nvidia/cu13/{path}", text)
        digest = hashlib.sha256(made[name].read_bytes()).hexdigest()
        pins.append({"name": name, "version": "1", "platform": "any", "sha256": digest})
    pins[1]["only"] = ["include/*", "lib/libb.so.13"]
    monkeypatch.setattr(cuda_toolkit, "_pins", lambda: pins)

    def fetch(argv: list[str], **_: Any) -> None:
        folder = Path(argv[argv.index("-d") + 1])
        (folder / made[folder.name].name).write_bytes(made[folder.name].read_bytes())

    monkeypatch.setattr("toolchain.process.run", fetch)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return made


def test_the_front_end_is_not_told_in_which_folder_a_source_lies(wheels: dict[str, Path], tmp_path: Path) -> None:
    made = cuda_toolkit.make(tmp_path / "cache", report=Silent())
    source = "/tmp/any where/sdist/vendor/llama.cpp/ggml/src/a.cu"
    argv = [str(made / "bin" / "cudafe++"), "--c++17", "--orig_src_path_name", source, "--other", source]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["--c++17", "--orig_src_path_name", "ggml/src/a.cu", "--other", source]


def test_the_toolkit_is_laid_out_as_nvcc_looks_for_it(wheels: dict[str, Path], tmp_path: Path) -> None:
    made = cuda_toolkit.make(tmp_path / "cache", report=Silent())
    assert (made / "bin" / "nvcc").stat().st_mode & 0o111
    for folder in ("", "targets/aarch64-linux", "targets/sbsa-linux"):
        assert (made / folder / "include" / "b.h").is_file()
        assert (made / folder / "lib" / "libb.so").read_text() == "b"
    assert not (made / "lib" / "libheavy.so.13").exists()
    assert not list(tmp_path.glob("**/out"))
    assert [path.name for path in (tmp_path / "cache" / "cuda").iterdir() if path.is_dir()] == [made.name]
    for wheel in wheels.values():
        wheel.unlink()
    assert cuda_toolkit.make(tmp_path / "cache", report=Silent()) == made


def test_another_host_is_told_to_build_on_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(HostError, match="this host is aarch64"):
        cuda_toolkit.make(tmp_path, report=Silent())
