"""The x86-64 bundle on processors from before SSE4.2 to AVX-512: which CPU backend is chosen, and that it answers."""

import re
import shutil
from pathlib import Path

import pytest

from tests.device import bundles, tiny_chat
from tests.device.test_rpi5 import answer, served
from toolchain.target import read_target

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
QEMU = shutil.which("qemu-x86_64-static")
_AVX2 = {"sse4_2", "avx", "f16c", "fma", "avx2", "bmi2"}
_AVX512 = _AVX2 | {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"}
VARIANTS = {
    "zen4": _AVX512 | {"avx512vbmi", "avx512_vnni", "avx512_bf16"},
    "cooperlake": _AVX512 | {"avx512_vnni", "avx512_bf16"},
    "icelake": _AVX512 | {"avx512vbmi", "avx512_vnni"},
    "cascadelake": _AVX512 | {"avx512_vnni"},
    "cannonlake": _AVX512 | {"avx512vbmi"},
    "skylakex": _AVX512,
    "alderlake": _AVX2 | {"avx_vnni"},
    "haswell": _AVX2,
    "piledriver": {"sse4_2", "avx", "f16c", "fma"},
    "ivybridge": {"sse4_2", "avx", "f16c"},
    "sandybridge": {"sse4_2", "avx"},
    "sse42": {"sse4_2"},
    "x64": set(),
}
"""Best first: what each one asks of the processor, as Linux calls it; ggml/src/CMakeLists.txt of the pinned source."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.around(bundles.x86_llama(), read_target("x86-cpu"), tmp_path_factory.mktemp("x86"))


def chosen(bundle: Path, log: Path, *emulator: str) -> str:
    """The variant that llama-server says it has loaded; it has given the right answer."""
    (model,) = bundle.glob("model/*.gguf")
    server = [*emulator, str(bundle / "runtime" / "bin" / "llama-server")]
    options = ["--model", str(model), "--ctx-size", "512", "--threads", "1", "--offline", "--verbose"]
    with served([*server, *options], log=log) as url:
        assert answer(url)["content"] == tiny_chat.ANSWER
    (found,) = set(re.findall(r"loaded CPU backend from \S+/libggml-cpu-(\w+)\.so", log.read_text()))
    return str(found)


def test_every_variant_is_in_the_bundle(bundle: Path) -> None:
    files = {path.name for path in (bundle / "runtime" / "bin").glob("libggml-cpu-*.so")}
    assert files == {f"libggml-cpu-{name}.so" for name in VARIANTS}


def test_this_host_gets_the_best_one_that_it_can_run(bundle: Path, tmp_path: Path) -> None:
    """AVX-512's where /proc/cpuinfo has it, else AVX2's, and so on."""
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    best = next(name for name, asked in VARIANTS.items() if asked <= flags)
    assert chosen(bundle, tmp_path / "log") == best


@pytest.mark.skipif(QEMU is None, reason="needs qemu-user-static")
@pytest.mark.parametrize(
    ("cpu", "variant"),
    [("Conroe", "x64"), ("Nehalem", "sse42"), ("SandyBridge", "sandybridge"), ("Haswell", "haswell")],
)
def test_an_older_processor_gets_one_that_it_can_run_and_answers(
    bundle: Path, tmp_path: Path, cpu: str, variant: str
) -> None:
    """A Nehalem has no AVX, a Conroe not even SSE4.2: whatever else is in the programs runs there too."""
    assert chosen(bundle, tmp_path / "log", str(QEMU), "-cpu", cpu) == variant
