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
from tests.device import bundles
from tests.stages.recipe_files import make_recipe
from toolchain.gguf import llama_cpp
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
    # As a build alone leaves it, not yet held against a target's rules.
    not_yet = shutil.ignore_patterns("isa.json")
    shutil.copytree(llama.root, made / "llama.cpp" / llama.root.name, symlinks=True, ignore=not_yet)
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


@pytest.fixture(scope="module")
def work(docker: Engine, train: str, toolchain: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student: trained in one image, taken up to its ledger in the other."""
    folder = tmp_path_factory.mktemp("work")
    make_recipe(folder)
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, 65532, 65532)
    on_cpu = ("--env", "TOOLCHAIN_GPU=optional")
    trained = run(docker, train, folder, "run", "recipe.toml", "--until", "merge", options=on_cpu)
    assert trained.returncode == 0, trained.stderr[-3000:]
    measured = run(docker, toolchain, folder, "run", "recipe.toml", "--until", "evaluate")
    assert measured.returncode == 0, measured.stderr[-3000:]
    return folder


def test_a_student_is_trained_in_one_image_and_bundled_in_the_other(docker: Engine, toolchain: str, work: Path) -> None:
    bundled = run(docker, toolchain, work, "run", "recipe.toml", "--until", "bundle")
    assert bundled.returncode == 0, bundled.stderr[-3000:]
    (bundle,) = work.glob("work/bundle-x86-cpu/*/tiny-*")
    # What a container has made is whole for the host.
    verified = bundles.toolchain("verify", str(bundle))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    (distilled,) = work.glob("work/distill/*")
    assert distilled.stat().st_uid == 65532


def test_a_bundle_for_another_target_is_made_with_the_cache_of_a_machine_that_built_for_it(
    docker: Engine, toolchain: str, work: Path
) -> None:
    """The Pi, and a profile of one's own that has a rule more than what is in the image was held against."""
    if bundles.toolchain("runtime", "where", "--target", "rpi5").returncode != 0:
        pytest.skip("not built: toolchain runtime build --target rpi5")
    mine = work / "mine.toml"
    text = (context.ROOT / "targets" / "x86-cpu.toml").read_text().replace('"x86-cpu"', '"mine"')
    mine.write_text(text.replace("[runtime.isa.forbidden]", "[runtime.isa.forbidden]\nx87 = '\\tfsin\\b'"))
    bundling = ("run", "recipe.toml", "--until", "bundle", "--target")
    for target, told in (
        ("rpi5", "llama.cpp is not built with these options"),
        ("mine.toml", "no disassembler for x86_64"),
    ):
        refused = run(docker, toolchain, work, *bundling, target)
        assert refused.returncode == 1
        assert told in refused.stderr
        assert "in a container" in refused.stderr
    assert bundles.toolchain("runtime", "where", "--target", str(mine)).returncode == 0
    cache = ("--volume", f"{llama_cpp.cache_folder()}:/opt/cache:ro")
    for target in ("rpi5", "mine"):
        name = "mine.toml" if target == "mine" else target
        bundled = run(docker, toolchain, work, *bundling, name, options=cache)
        assert bundled.returncode == 0, bundled.stderr[-3000:]
        assert len(list(work.glob(f"work/bundle-{target}/*/tiny-*-{target}"))) == 1


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


NVCC = """\
#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release 12.6, V12.6.68" && exit
echo "stand-in nvcc, called with: $*" >&2
exit 1
"""
STAND_IN = """\
FROM {debian}
COPY nvcc /usr/local/cuda/bin/nvcc
COPY cuda_runtime.h /usr/local/cuda/include/
COPY libcudart.so /usr/local/cuda/lib64/
COPY libdevice /usr/local/cuda/nvvm/libdevice
COPY downloads /opt/cache/downloads
"""


@pytest.fixture(scope="module")
def jetpack(docker: Engine, debian: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stand-in for NVIDIA's image, which cannot be had here: what CMake looks for before it calls the compiler."""
    made = tmp_path_factory.mktemp("jetpack")
    (made / "nvcc").write_text(NVCC)
    (made / "nvcc").chmod(0o755)
    (made / "cuda_runtime.h").write_text("#define CUDART_VERSION 12060\n")
    argv = ["gcc", "-shared", "-x", "c", "-o", str(made / "libcudart.so"), "/dev/null"]
    subprocess.run(argv, check=True)
    for name in ("libdevice", "downloads"):
        (made / name).mkdir()
    (made / "libdevice" / "libdevice.10.bc").write_text("")
    shutil.copy2(llama_cpp.fetch(), made / "downloads")
    (made / "Dockerfile").write_text(STAND_IN.format(debian=debian))
    tag = "toolchain-test:jetpack"
    built = docker.run("build", "--tag", tag, str(made))
    assert built.returncode == 0, built.stderr[-2000:]
    return tag


def test_the_jetsons_dockerfile_goes_on_until_the_compiler_compiles(docker: Engine, folder: Path, jetpack: str) -> None:
    """On x86-64, so by a profile that differs in the processor alone: packages, Python, source, patches, CMake."""
    text = (folder / "targets" / "jetson-orin.toml").read_text()
    for was, now in (('"jetson-orin"', '"stand-in"'), ('"aarch64"', '"x86_64"'), ("GGML_CPU_ARM_ARCH = ", "ARM = ")):
        assert was in text
        text = text.replace(was, now)
    (folder / "targets" / "stand-in.toml").write_text(text)
    arguments = {
        "BASE": jetpack,
        "PYTHON": "python3",
        "PIP_OPTIONS": "--no-index --find-links /wheels",
        "TARGET": "targets/stand-in.toml",
    }
    built = docker.run(
        *("build", "--network", "host", "--progress", "plain", "--file", f"{folder}/docker/jetson-orin.Dockerfile"),
        *(part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")),
        str(folder),
        timeout_s=900,
    )
    assert built.returncode != 0
    for told in (
        "error: cmake exited with 1",
        "Found CUDAToolkit: /usr/local/cuda/include",
        "The CUDA compiler identification is unknown",
        '"/usr/local/cuda/bin/nvcc"',
        "is not able to compile a simple test program",
    ):
        assert told in built.stderr, built.stderr[-3000:]
