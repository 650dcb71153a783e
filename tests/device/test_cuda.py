"""A bundle that promises a GPU: every layer is on it, or the bundle says so and does not serve."""

import json
from pathlib import Path

import pytest

from tests.device import bundles
from toolchain.gguf import llama_cpp
from toolchain.reporter import Silent
from toolchain.target import read_target

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
PROFILE = Path(__file__).with_name("x86-cuda.toml")
NEEDS_GPU = pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def without_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose manifest promises CUDA, and whose programs were built without it."""
    cpu = read_target("x86-cpu")
    target = cpu.model_copy(update={"server": cpu.server.model_copy(update={"gpu_layers": "all"})})
    bundle = bundles.around(llama_cpp.find(cpu.runtime.cmake), target, tmp_path_factory.mktemp("without"))
    bundles.promise_cuda(bundle)
    return bundle


@pytest.mark.parametrize("verb", ["serve", "smoke", "bench"])
def test_a_build_without_cuda_does_not_answer_from_the_processor(without_cuda: Path, verb: str) -> None:
    ran = bundles.edgectl(without_cuda, verb)
    assert ran.returncode == 1
    assert "llama-server finds no CUDA device, and would use the processor" in ran.stdout + ran.stderr


def test_libraries_that_the_machine_lacks_are_named(tmp_path: Path) -> None:
    cpu = read_target("x86-cpu")
    lacking = cpu.runtime.model_copy(update={"device_libraries": ("libm.so.6", "libcublas.so.99")})
    bundle = bundles.around(llama_cpp.find(cpu.runtime.cmake), cpu.model_copy(update={"runtime": lacking}), tmp_path)
    ran = bundles.edgectl(bundle, "verify", "--json")
    checks = {item["name"]: item for item in json.loads(ran.stdout)["checks"]}
    assert (ran.returncode, checks["libraries"]["ok"]) == (1, False)
    assert checks["libraries"]["detail"] == "missing: libcublas.so.99"


@pytest.fixture(scope="module")
def with_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _with_layers("all", tmp_path_factory.mktemp("cuda"))


def _with_layers(gpu_layers: str | int, out: Path) -> Path:
    target = read_target(str(PROFILE))
    target = target.model_copy(update={"server": target.server.model_copy(update={"gpu_layers": gpu_layers})})
    return bundles.around(llama_cpp.build(target.runtime.cmake, report=Silent()), target, out)


@pytest.mark.gpu
@NEEDS_GPU
def test_every_layer_is_on_the_gpu_and_the_answers_are_right(with_cuda: Path) -> None:
    ran = bundles.edgectl(with_cuda, "smoke", "--json")
    checks = {item["name"]: item for item in json.loads(ran.stdout)["checks"]}
    assert ran.returncode == 0, checks
    assert checks["backend"]["detail"].startswith("CUDA0 holds")
    assert "2 of 2 layers on the GPU" in checks["backend"]["detail"]  # its one layer, and the output


@pytest.mark.gpu
@NEEDS_GPU
def test_as_many_layers_are_on_the_gpu_as_the_profile_says(tmp_path: Path) -> None:
    ran = bundles.edgectl(_with_layers(1, tmp_path), "smoke", "--json")
    checks = {item["name"]: item for item in json.loads(ran.stdout)["checks"]}
    assert ran.returncode == 0, checks
    assert "1 of 2 layers on the GPU; CUDA with 1 layers is expected" in checks["backend"]["detail"]


@pytest.mark.gpu
@NEEDS_GPU
def test_the_machine_has_what_the_bundle_needs(with_cuda: Path) -> None:
    ran = bundles.edgectl(with_cuda, "verify")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.gpu
@NEEDS_GPU
def test_a_gpu_that_is_hidden_is_missed(with_cuda: Path) -> None:
    ran = bundles.edgectl(with_cuda, "smoke", CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 1
    assert "finds no CUDA device" in ran.stdout
