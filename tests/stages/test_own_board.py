"""A board that the toolchain has never heard of, from its profile's file alone: no line of code knows it."""

import json
import tomllib
from pathlib import Path

import pytest

from tests.device import bundles
from tests.stages.recipe_files import toolchain
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.resources import resource

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]

PROFILE = """\
name = "my-board"
description = "made up for a test"
arch = "x86_64"
memory_mib = 1024
disk_mib = 512

[runtime]
backend = "CPU"
glibc_floor = "2.31"

[runtime.cmake]
{cmake}
[runtime.isa]
chosen_at_run_time = ["libggml-cpu-[!sx]*.so", "libggml-cpu-s[ak]*.so"]     # the oldest two are looked at as well

[runtime.isa.forbidden]
AVX = '%[yz]mm[0-9]'
"trigonometry in the x87" = '\\tfsin\\b'

[server]
threads = 1
cache_ram_mib = 3
ready_timeout_s = 77

[budgets]
cold_start_s = 11
power_mode = "made up"
"""


@pytest.fixture
def board(llama: LlamaCpp, tmp_path: Path) -> Path:
    """Built by the options of x86-cpu, so that what is built of llama.cpp already will do."""
    cmake = tomllib.loads((resource("targets") / "x86-cpu.toml").read_text())["runtime"]["cmake"]
    path = tmp_path / "boards" / "my-board.toml"
    path.parent.mkdir()
    path.write_text(PROFILE.format(cmake="".join(f"{key} = {json.dumps(value)}\n" for key, value in cmake.items())))
    return path


def test_a_bundle_is_made_and_verified_as_its_file_says(copy: Path, board: Path) -> None:
    ran = toolchain(copy, "run", "--until", "bundle", "--target", str(board))
    assert ran.returncode == 0, ran.stderr
    (bundle,) = (copy.parent / "work" / "bundle-my-board").glob("*/tiny-*-my-board")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["target"] == {"name": "my-board", "description": "made up for a test", "arch": "x86_64"}
    assert manifest["runtime"]["glibc_floor"] == "2.31"
    presets = json.loads((bundle / "presets.json").read_text())
    assert presets["server"]["threads"] == 1
    assert presets["server"]["ready_timeout_s"] == 77
    argv = presets["server"]["argv"]
    assert argv[argv.index("--cache-ram") + 1] == "3"
    assert presets["budgets"] == {"cold_start_s": 11, "power_mode": "made up"}
    assert not list((copy.parent / "work").glob("*-x86-cpu"))
    verified = bundles.toolchain("verify", str(bundle))
    assert verified.returncode == 0, verified.stderr
    on_it = bundles.edgectl(bundle, "verify")
    assert on_it.returncode == 0, on_it.stdout + on_it.stderr


@pytest.mark.parametrize(
    ("was", "now", "says"),
    [
        ("fsin", "pxor", r"uses trigonometry in the x87, which the target my-board does not have: "),
        ("[!sx]*", "[!hsx]*", "libggml-cpu-haswell.so uses AVX, which the target my-board does not have: "),
        ('glibc_floor = "2.31"', 'glibc_floor = "2.20"', "the target my-board has 2.20"),
        ('arch = "x86_64"', 'arch = "aarch64"', "the target my-board is aarch64"),
        ("[runtime.cmake]", "page_bytes = 16384\n[runtime.cmake]", "the target my-board may have pages of 16384"),
    ],
)
def test_what_its_file_rules_out_is_refused(board: Path, was: str, now: str, says: str) -> None:
    text = board.read_text()
    assert was in text
    board.write_text(text.replace(was, now))
    checked = bundles.toolchain("runtime", "where", "--target", str(board))
    assert checked.returncode != 0
    assert says in checked.stderr
    assert checked.stdout == ""
