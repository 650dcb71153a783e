"""The Raspberry Pi's programs, cross-compiled: inspected, and run by qemu as its processor would."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.device import bundles, records, tiny_chat
from tests.device.test_bundle_image import config_in, read, saved
from toolchain.bundle import image, runtime
from toolchain.device import files, greedy
from toolchain.device.client import Client
from toolchain.errors import HostError
from toolchain.gguf import llama_cpp
from toolchain.reporter import Silent
from toolchain.target import read_target

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
_SYSROOT = "/usr/aarch64-linux-gnu"
QEMU = shutil.which("qemu-aarch64-static")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = read_target("rpi5")
    try:
        llama = llama_cpp.find(target.runtime.cmake)
    except HostError as error:
        pytest.skip(f"{error.message}: toolchain runtime build --target rpi5")
    return bundles.around(llama, target, tmp_path_factory.mktemp("rpi5"))


def test_the_programs_are_for_the_board_and_small(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["target"]["arch"] == "aarch64"
    assert manifest["runtime"]["segment_alignment"] >= 16384
    programs = bundle / "runtime" / "bin"
    assert {path.name for path in programs.iterdir()} == set(runtime.PROGRAMS)
    elf = runtime.read_elf(programs / "llama-server")
    assert elf.arch == "aarch64"
    assert set(elf.needed) <= {"libc.so.6", "libm.so.6", "ld-linux-aarch64.so.1"}
    without_model = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file() and path.suffix != ".gguf")
    assert without_model <= 40e6


def argv(bundle: Path, cpu: str, *options: str) -> list[str]:
    if QEMU is None or not Path(_SYSROOT).is_dir():
        pytest.skip("needs qemu-user-static and libc6-arm64-cross")
    server = bundle / "runtime" / "bin" / "llama-server"
    return [QEMU, "-cpu", cpu, "-L", _SYSROOT, str(server), *options]


@contextmanager
def served(command: list[str], cwd: Path | None = None, log: Path = Path(os.devnull)) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [*command, "--port", str(port)]
    with log.open("wb") as sink:
        child = subprocess.Popen(argv, cwd=cwd, stdout=sink, stderr=sink)
    url = f"http://127.0.0.1:{port}"
    try:
        limit = time.monotonic() + 120
        while True:
            assert child.poll() is None, f"the server ended with {child.returncode}"
            assert time.monotonic() < limit
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                break
        yield url
    finally:
        child.terminate()
        child.wait(30)


def answer(url: str) -> dict[str, Any]:
    body = {"prompt": tiny_chat.golden()[0]["prompt_ids"], "n_predict": 8, "temperature": 0, "return_tokens": True}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as reply:
        found: dict[str, Any] = json.load(reply)
    return {name: found[name] for name in ("content", "tokens", "stop_type")}


def test_a_cortex_a76_says_what_this_host_says(bundle: Path) -> None:
    options = ["--model", str(next(bundle.glob("model/*.gguf"))), "--ctx-size", "512", "--threads", "1", "--offline"]
    host = llama_cpp.find(read_target("x86-cpu").runtime.cmake).program("llama-server")
    with served([str(host), *options]) as url:
        expected = answer(url)
    assert expected["content"] == tiny_chat.ANSWER
    recorded = files.open_bundle(bundle).answers()
    assert recorded is not None
    assert recorded["made_by"]["library"].startswith("libggml-cpu-")  # this host's
    with served(argv(bundle, "cortex-a76", *options)) as url:
        assert answer(url) == expected
        client, prompts = (
            Client("127.0.0.1", int(url.rsplit(":", 1)[1])),
            [row["prompt_ids"] for row in tiny_chat.golden()],
        )
        ok, shown = greedy.compare(client, prompts, recorded, [[], []])
    assert ok, shown
    assert shown.startswith("10 of 10 recorded tokens")


def test_a_processor_without_the_dot_product_is_told_by_a_signal(bundle: Path) -> None:
    """Built for the Cortex-A76: an older core stops at the first instruction that it does not know."""
    model = next(bundle.glob("model/*.gguf"))
    ran = subprocess.run(
        argv(bundle, "cortex-a57", "--model", str(model)), capture_output=True, check=False, timeout=120
    )
    assert ran.returncode in (-4, 132)


def test_a_benchmark_of_it_here_marks_every_figure_as_not_measured(bundle: Path, tmp_path: Path) -> None:
    """The kernel starts arm64 programs by qemu."""
    if not Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists():
        pytest.skip("the kernel does not know qemu-aarch64: apt-get install qemu-user-static binfmt-support")
    copy, out = tmp_path / "copy", tmp_path / "record.json"
    shutil.copytree(bundle, copy)
    presets = json.loads((copy / "presets.json").read_text())
    presets["server"]["threads"] = 1  # more than there are processors would wait for each other
    (copy / "presets.json").write_text(json.dumps(presets))
    little = ["--repetitions", "1", "--cold-starts", "1", "--prompt-tokens", "32", "--generated-tokens", "4"]
    little += ["--depth", "128", "--clients", "1,2", "--sustained", "0.5"]
    ran = bundles.edgectl(copy, "bench", *little, "--out", str(out), QEMU_CPU="cortex-a76")
    assert ran.returncode == 0, ran.stderr
    record = json.loads(out.read_text())
    assert (record["measured"], record["emulated"]) == (
        False,
        "the kernel runs on x86_64, the programs are for aarch64",
    )
    marks = records.figures(record)
    assert [path for path, mark in marks.items() if mark is not False] == []
    assert {path.split(".")[0] for path in marks} == {"metrics", "memory", "roofline", "sustained", "page_cache"}
    gated = bundles.edgectl(copy, "gate", str(out), "--json")
    assert (gated.returncode, json.loads(gated.stdout)["verdict"]) == (6, "inconclusive")


def test_its_image_is_for_arm64(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "image.tar"
    image.pack(bundle, out, base=saved(tmp_path / "base.tar", arch="arm64"), report=Silent())
    content = read(out)
    entry = json.loads(content["index.json"])["manifests"][0]
    assert entry["platform"] == {"os": "linux", "architecture": "arm64", "variant": "v8"}
    assert config_in(content)["architecture"] == "arm64"
    with pytest.raises(HostError, match="is for linux/amd64, the bundle for linux/arm64"):
        image.pack(bundle, tmp_path / "other.tar", base=saved(tmp_path / "x86.tar"), report=Silent())
