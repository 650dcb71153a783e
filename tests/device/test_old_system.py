"""The x86-64 bundle on an older system: run by glibc 2.31's own loader and libraries, in the place of this host's."""

import re
from pathlib import Path

import pytest

from tests.device import bundles, tiny_chat
from tests.device.test_rpi5 import answer, served
from toolchain.bundle import runtime
from toolchain.gguf import llama_cpp, sysroot
from toolchain.reporter import Silent
from toolchain.target import read_target

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a bundle for x86-cpu, whose model lies beside them."""
    bundle = bundles.around(bundles.x86_llama(), read_target("x86-cpu"), tmp_path_factory.mktemp("old"))
    (model,) = bundle.glob("model/*.gguf")
    model.rename(bundle / "runtime" / "bin" / "model.gguf")
    return bundle / "runtime" / "bin"


def test_nothing_in_it_asks_for_a_newer_glibc(programs: Path) -> None:
    newest = {path.name: runtime.read_elf(path).glibc for path in programs.iterdir() if path.suffix != ".gguf"}
    assert newest.keys() >= {"llama-server", "libstdc++.so.6", "libgcc_s.so.1", "libggml-cpu-zen4.so"}
    assert {name: version for name, version in newest.items() if version > (2, 31)} == {}


def test_it_answers_on_glibc_2_31_as_on_this_host(programs: Path) -> None:
    older = sysroot.make(llama_cpp.cache_folder(), report=Silent()) / "usr" / "lib"
    options = ["--model", "model.gguf", "--ctx-size", "512", "--threads", "1", "--offline"]
    by_older = [str(older / "ld-2.31.so"), "--library-path", f"{programs}:{older}", str(programs / "llama-server")]
    with served([str(programs / "llama-server"), *options], programs) as url:
        here = answer(url)
    with served([*by_older, *options], programs) as url:
        there = answer(url)
        port = url.rpartition(":")[2]
        (maps,) = (
            (process / "maps").read_text()
            for process in Path("/proc").iterdir()
            if process.name.isdigit() and f"--port\0{port}\0" in (process / "cmdline").read_text(errors="replace")
        )
    assert there == here
    assert there["content"] == tiny_chat.ANSWER
    # The bundle's own C++ library, the older system's for the rest, none of this host.
    loaded = set(re.findall(r"/\S+\.so\S*", maps))
    assert {Path(path).parent for path in loaded} == {older, programs}
    assert {"ld-2.31.so", "libc-2.31.so", "libstdc++.so.6"} <= {Path(path).name for path in loaded}
