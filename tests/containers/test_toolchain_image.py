"""The images `train` and `toolchain`: a tiny student is trained, on the processor, in one and bundled in the other."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.containers import context
from tests.containers.engine import Engine
from tests.stages.recipe_files import make_recipe
from toolchain.gguf import llama_cpp
from toolchain.resources import versions
from toolchain.target import read_target

pytestmark = [pytest.mark.docker, pytest.mark.llama_cpp]
EXTRAS = "train,gguf,endpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, with the wheels and the llama.cpp that an image otherwise fetches and builds."""
    made = context.make(tmp_path_factory.mktemp("context"))
    pins = (context.ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    build_system = tomllib.loads((context.ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(made / "wheels")]
    argv += ["-c", str(made / "constraints.txt"), f"{torch}+cpu", *build_system, f"{made}[{EXTRAS}]"]
    fetched = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert fetched.returncode == 0, fetched.stderr[-2000:]
    llama = llama_cpp.find(read_target("x86-cpu").runtime.cmake)
    shutil.copytree(llama.root, made / "llama.cpp" / llama.root.name, symlinks=True)
    return made


def build(docker: Engine, folder: Path, debian: str, target: str) -> str:
    tag = f"toolchain-test:{target}"
    arguments = {
        "DEBIAN": debian,
        "PIP_OPTIONS": "--no-index --find-links /wheels",
        "EXTRAS": EXTRAS,
    }
    built = docker.run(
        *("build", "--network", "host", "--file", f"{folder}/docker/Dockerfile", "--target", target, "--tag", tag),
        *(part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")),
        str(folder),
        timeout_s=1800,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return tag


@pytest.fixture(scope="module")
def train(docker: Engine, folder: Path, debian: str) -> str:
    """With torch's CPU build, and without Unsloth, which needs a GPU."""
    return build(docker, folder, debian, "train")


@pytest.fixture(scope="module")
def toolchain(docker: Engine, folder: Path, debian: str) -> str:
    return build(docker, folder, debian, "toolchain")


def run(
    docker: Engine, tag: str, work: Path, *arguments: str, options: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    """As the README has it, and confined: read-only, not as root, without a network."""
    confined = ["--read-only", "--tmpfs", "/tmp:exec", "--network", "none", "--cap-drop", "ALL"]
    confined += ["--security-opt", "no-new-privileges", "--shm-size", "1g", "--volume", f"{work}:/work"]
    return docker.run("run", "--rm", *confined, *options, tag, *arguments, timeout_s=1500)


def test_a_student_is_trained_in_one_image_and_bundled_in_the_other(
    docker: Engine, train: str, toolchain: str, tmp_path: Path
) -> None:
    make_recipe(tmp_path)
    for path in (tmp_path, *tmp_path.rglob("*")):
        shutil.chown(path, 65532, 65532)
    on_cpu = ("--env", "TOOLCHAIN_GPU=optional")
    trained = run(docker, train, tmp_path, "run", "recipe.toml", "--until", "merge", options=on_cpu)
    assert trained.returncode == 0, trained.stderr[-3000:]
    bundled = run(docker, toolchain, tmp_path, "run", "recipe.toml", "--until", "bundle")
    assert bundled.returncode == 0, bundled.stderr[-3000:]
    (bundle,) = tmp_path.glob("work/bundle-x86-cpu/*/tiny-*")
    # What a container has made is whole for the host.
    argv = [sys.executable, "-m", "toolchain.cli", "verify", str(bundle)]
    verified = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    (distilled,) = tmp_path.glob("work/distill/*")
    assert distilled.stat().st_uid == 65532


def test_a_train_image_without_a_gpu_says_how_to_give_it_one(docker: Engine, train: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    ran = run(docker, train, tmp_path, "run", "recipe.toml")
    assert ran.returncode == 3
    assert ran.stderr.splitlines()[:2] == [
        "error: no NVIDIA GPU in this container",
        "hint: docker run --gpus all (needs the NVIDIA container toolkit on the host); "
        "for a processor alone, slow: -e TOOLCHAIN_GPU=optional",
    ]


def test_what_only_reads_needs_no_folder_to_write_to(docker: Engine, toolchain: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for arguments, code in ((["-h"], 0), (["run", "-h"], 0), (["plan", "recipe.toml"], 2), (["verify", "bundle"], 1)):
        ran = run(docker, toolchain, tmp_path, *arguments)
        assert "cannot be written" not in ran.stderr
        assert ran.returncode == code
    ran = run(docker, toolchain, tmp_path, "run", "recipe.toml", "--work", "/opt/new/work")
    assert ran.returncode == 3
    assert "error: /opt cannot be written by user 65532:65532" in ran.stderr


def test_a_work_folder_that_cannot_be_written_and_little_shared_memory_are_told(
    docker: Engine, train: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    ran = run(docker, train, tmp_path, "run", "recipe.toml", options=("--shm-size", "64m"))
    assert ran.returncode == 3
    if os.geteuid() == 0:
        assert "error: /work cannot be written by user 65532:65532" in ran.stderr
        assert 'hint: mount a folder of yours and run as yourself: -v "$PWD":/work --user "$(id -u):$(id -g)"' in (
            ran.stderr
        )
    assert "error: shared memory, /dev/shm, has 64 MiB, 512 are needed" in ran.stderr
    assert "hint: docker run --shm-size 2g" in ran.stderr


def test_no_build_tools_and_no_package_manager_of_python_are_left(docker: Engine, toolchain: str) -> None:
    look = "import shutil; print([n for n in ('gcc', 'g++', 'cmake', 'ninja', 'pip', 'make') if shutil.which(n)])"
    ran = docker.run("run", "--rm", "--entrypoint", "python3", toolchain, "-c", look)
    assert ran.stdout.strip() == "[]"
    helped = docker.run("run", "--rm", toolchain)
    assert helped.returncode == 0
    assert helped.stdout.startswith("Usage: toolchain")


def test_the_jetsons_dockerfile_goes_as_far_as_the_compiler(docker: Engine, folder: Path, debian: str) -> None:
    """On a stand-in for NVIDIA's image, which has the compiler and cannot be had here."""
    arguments = {"BASE": debian, "PYTHON": "python3", "PIP_OPTIONS": "--no-index --find-links /wheels"}
    built = docker.run(
        *("build", "--network", "host", "--progress", "plain", "--file", f"{folder}/docker/jetson-orin.Dockerfile"),
        *(part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")),
        str(folder),
        timeout_s=900,
    )
    assert built.returncode != 0
    assert "error: jetson-orin is built on aarch64, this host is x86_64" in built.stderr


def test_the_dockerfiles_name_the_pinned_bases() -> None:
    jetson = (context.ROOT / "docker" / "jetson-orin.Dockerfile").read_text().splitlines()
    assert f"ARG BASE={versions()['images']['jetson_orin_build']}" in jetson
    for name in ("Dockerfile", "runtime.Dockerfile"):
        lines = (context.ROOT / "docker" / name).read_text().splitlines()
        assert f"ARG DEBIAN={versions()['images']['debian']}" in lines
