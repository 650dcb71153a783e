"""runtime-x86-cpu and runtime-rpi5: built by an engine, run as on a device, asked a question, stopped."""

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from tests.containers import context
from tests.containers.engine import Engine
from tests.containers.serving import CONFINED, ask, expect_confined, expect_stop, inspect, running
from tests.device import bundles, records, tiny_chat
from toolchain.bundle import forms, image, minimal_base
from toolchain.gguf import llama_cpp
from toolchain.reporter import Silent
from toolchain.target import Image, read_target

pytestmark = [pytest.mark.docker, pytest.mark.llama_cpp]
PLATFORMS = {"x86-cpu": "linux/amd64", "rpi5": "linux/arm64"}


def bundle_in(folder: Path, target: str) -> Path:
    return folder / "work" / f"bundle-{target}" / "0123456789abcdef" / f"tiny-1.0-{target}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images are built: the checkout, and a bundle for each target where a run leaves it."""
    made = context.make(tmp_path_factory.mktemp("context"))
    for name in PLATFORMS:
        out = bundle_in(made, name).parent
        out.mkdir(parents=True)
        target = read_target(name)
        bundles.around(llama_cpp.find(target.runtime.cmake), target, out)
    return made


@pytest.fixture(scope="module")
def images(docker: Engine, debian: str, folder: Path) -> dict[str, str]:
    """Target → the image that runtime.Dockerfile makes of its bundle."""
    tags = {}
    for name, platform in PLATFORMS.items():
        tags[name] = f"toolchain-test:runtime-{name}"
        built = docker.run(
            *("build", "--network", "host", "--platform", platform, "--file", f"{folder}/docker/runtime.Dockerfile"),
            *(
                "--build-arg",
                f"DEBIAN={debian}",
                "--build-arg",
                f"BUNDLE={bundle_in(folder, name).relative_to(folder)}",
            ),
            *("--tag", tags[name], str(folder)),
        )
        assert built.returncode == 0, built.stderr[-3000:]
    return tags


def chat(docker: Engine, name: str, *more: str) -> Any:
    body = {"messages": tiny_chat.golden()[0]["messages"], "temperature": 0}
    return ask(docker, name, "/v1/chat/completions", body, *more)


def expect_service(docker: Engine, name: str) -> None:
    assert chat(docker, name)["choices"][0]["message"]["content"] == tiny_chat.ANSWER
    assert chat(docker, name, "without key") == 401


def test_without_its_model_the_image_is_small_and_has_no_shell(
    docker: Engine, images: dict[str, str], folder: Path
) -> None:
    model = next((bundle_in(folder, "x86-cpu") / "model").iterdir()).stat().st_size
    assert inspect(docker, images["x86-cpu"])["Size"] - model <= 150e6
    for program in ("/bin/sh", "/usr/bin/apt-get", "/usr/bin/dpkg", "/usr/bin/gcc"):
        ran = docker.run("run", "--rm", *CONFINED, "--entrypoint", program, images["x86-cpu"])
        assert "no such file" in ran.stderr


def test_it_serves_read_only_and_not_as_root_is_healthy_and_stops_when_asked(
    docker: Engine, images: dict[str, str], folder: Path
) -> None:
    with running(docker, images["x86-cpu"], folder, "--health-interval", "1s") as name:
        expect_service(docker, name)
        expect_confined(docker, name)
        limit = time.monotonic() + 30
        while inspect(docker, name)["State"]["Health"]["Status"] != "healthy":
            assert time.monotonic() < limit
            time.sleep(0.2)
        verified = docker.run("exec", name, "python3", "-I", "-S", "/bundle/edgectl", "verify")
        assert verified.returncode == 0, verified.stdout
        expect_stop(docker, name)


def test_without_a_key_it_does_not_listen_to_the_network(docker: Engine, images: dict[str, str]) -> None:
    ran = docker.run("run", "--rm", *CONFINED, images["x86-cpu"])
    assert ran.returncode != 0
    assert "error: --api-key-file /run/secrets/api_key: cannot be read" in ran.stderr


def need_qemu() -> None:
    if not Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists():
        if os.environ.get("CI"):
            pytest.fail("the kernel does not know qemu-aarch64")
        pytest.skip("the kernel does not know qemu-aarch64: apt-get install qemu-user-static binfmt-support")


def test_a_benchmark_under_qemu_runs_to_its_end_and_calls_no_figure_measured(
    docker: Engine, images: dict[str, str]
) -> None:
    need_qemu()
    little = ("--repetitions", "1", "--cold-starts", "1", "--prompt-tokens", "32", "--generated-tokens", "4")
    ran = docker.run(
        *("run", "--rm", *CONFINED, "--tmpfs", "/tmp", "--env", "QEMU_CPU=cortex-a76", "--entrypoint", "python3"),
        *(images["rpi5"], "-I", "-S", "/bundle/edgectl", "bench", "--json", *little, "--depth", "128"),
        *("--clients", "1,2", "--sustained", "0", "--cool-down", "0"),
    )
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    assert record["measured"] is False
    assert "qemu" in record["emulated"].lower() or "x86" in record["emulated"]
    assert {"pp32_tps", "tg4_tps", "tg4_d128_tps", "cold_start_warm_s", "ttft_2_clients_s"} <= set(record["metrics"])
    marks = records.figures(record)
    assert [path for path, mark in marks.items() if mark is not False] == []
    assert {path.split(".")[0] for path in marks} == {"metrics", "memory", "roofline", "page_cache"}


def test_the_pis_image_gives_the_tokens_of_the_x86_one(docker: Engine, images: dict[str, str], folder: Path) -> None:
    """Under qemu's Cortex-A76, which the kernel starts for arm64 programs."""
    need_qemu()
    body = {"prompt": tiny_chat.golden()[1]["prompt_ids"], "n_predict": 16, "temperature": 0, "return_tokens": True}
    tokens = {}
    for target, options in (("x86-cpu", ()), ("rpi5", ("--env", "QEMU_CPU=cortex-a76"))):
        with running(docker, images[target], folder, *options) as name:
            expect_service(docker, name)
            tokens[target] = ask(docker, name, "/completion", body)["tokens"]
    assert inspect(docker, images["rpi5"])["Architecture"] == "arm64"
    assert tokens["rpi5"] == tokens["x86-cpu"]
    assert tokens["rpi5"]


def test_without_an_engine_the_same_image_is_made(
    docker: Engine, debian: str, folder: Path, images: dict[str, str], tmp_path: Path
) -> None:
    """On the same base: how it starts, as whom, and what it says of itself."""
    minimal = "toolchain-test:minimal"
    built = docker.run(
        *("build", "--network", "host", "--file", f"{folder}/docker/runtime.Dockerfile", "--target", "minimal"),
        *("--build-arg", f"DEBIAN={debian}", "--tag", minimal, str(folder)),
    )
    assert built.returncode == 0, built.stderr[-3000:]
    base = tmp_path / "base.tar"
    assert docker.run("save", "--output", str(base), minimal).returncode == 0
    made = image.pack(bundle_in(folder, "x86-cpu"), tmp_path / "image.tar", base=base, report=Silent())
    assert docker.run("load", "--input", str(tmp_path / "image.tar")).returncode == 0
    packed, by_engine = (inspect(docker, name)["Config"] for name in (made["reference"], images["x86-cpu"]))
    for key in ("Entrypoint", "Cmd", "User", "WorkingDir", "Env", "ExposedPorts", "StopSignal", "Healthcheck"):
        assert packed[key], key
        assert packed[key] == by_engine[key], key
    # A Dockerfile cannot read the manifest: version and identity are labels of the other one alone.
    assert by_engine["Labels"].keys() < packed["Labels"].keys()


def test_a_base_is_made_of_the_image_that_a_profile_names_as_the_hint_says(
    docker: Engine, debian: str, folder: Path, tmp_path: Path
) -> None:
    """A library of a made-up device, in an image that lacks Python as NVIDIA's do."""
    (tmp_path / "Dockerfile").write_text(f"FROM {debian}\nRUN touch /usr/lib/libnpu.so\n")
    built = docker.run("build", "--network", "host", "--tag", "toolchain-test:npu", str(tmp_path))
    assert built.returncode == 0, built.stderr[-2000:]
    target = read_target("x86-cpu").model_copy(update={"image": Image(base="toolchain-test:npu")})
    target = target.model_copy(
        update={"runtime": target.runtime.model_copy(update={"device_libraries": ("libnpu.so",)})}
    )
    out = tmp_path / "base.tar"
    build, save = (shlex.split(part)[1:] for part in minimal_base.how(target, out=out).split(" && "))
    assert build[:3] == ["build", "-f", "docker/runtime.Dockerfile"]
    assert build[-1] == "."
    dockerfile = f"{folder}/docker/runtime.Dockerfile"
    for argv in (["build", "--network", "host", "-f", dockerfile, *build[3:-1], str(folder)], save):
        ran = docker.run(*argv)
        assert ran.returncode == 0, ran.stderr[-2000:]
    forms.check_base(out, target)


def test_an_image_that_was_packed_without_an_engine_serves_as_well(
    docker: Engine, folder: Path, tmp_path: Path
) -> None:
    base, again, out = (tmp_path / f"{name}.tar" for name in ("base", "again", "image"))
    for path in (base, again):
        minimal_base.make(path, arch="x86_64", report=Silent())
    assert base.read_bytes() == again.read_bytes()
    result = image.pack(bundle_in(folder, "x86-cpu"), out, base=base, report=Silent())
    loaded = docker.run("load", "--input", str(out))
    assert loaded.returncode == 0, loaded.stderr
    with running(docker, result["reference"], tmp_path) as name:
        expect_service(docker, name)
