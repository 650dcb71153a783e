"""Bad input of the stages around the GGUF, through the command line: one error that names the thing, the cause and the
next step; what is half done is never taken for done."""

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stages.gguf_files import to_gguf, to_matrix
from tests.stages.recipe_files import toolchain
from tests.tiny import make_tiny_checkpoint
from toolchain.gguf import convert, imatrix, quantize
from toolchain.gguf.llama_cpp import LlamaCpp

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]


@pytest.fixture(scope="module")
def ready(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that had run, where its models now lie; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("ready") / "copy"
    shutil.copytree(done.parent, folder, symlinks=True)
    ran = toolchain(folder / "recipe.toml", "run", "--until", "evaluate")
    assert ran.returncode == 0, ran.stderr
    return folder / "recipe.toml"


def the(recipe: Path, pattern: str) -> Path:
    """The one file below the work folder that the pattern fits."""
    (found,) = (recipe.parent / "work").glob(pattern)
    return found


@contextmanager
def undone(recipe: Path, stage: str) -> Iterator[None]:
    """As if the stage had not run yet; afterwards it has again."""
    folder = recipe.parent / "work" / stage
    kept = folder.rename(folder.with_name(f"kept {stage}"))
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)


def refused(recipe: Path, stage: str, *options: str, code: int = 1) -> str:
    """Run one stage that must fail as a user should see it; its error and hint."""
    ran = toolchain(recipe, stage, *options)
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    error, _, hint = ran.stderr.partition("error: ")[2].partition("\nhint: ")
    assert hint
    assert "error: " not in error + hint
    assert not list((recipe.parent / "work" / stage).glob("*/manifest.json"))
    return f"{error}\nhint: {hint}"


def test_a_matrix_of_another_model_is_refused_with_what_differs(ready: Path, llama: LlamaCpp, tmp_path: Path) -> None:
    other = make_tiny_checkpoint(tmp_path / "model", hidden=128)
    to_gguf(other, tmp_path, llama)
    rows = the(ready, "select/*/train.jsonl")
    matrix = to_matrix(tmp_path / convert.OUTPUT, rows, other, llama, tmp_path / "matrix")
    with undone(ready, "imatrix"):
        said = refused(ready, "imatrix", "--set", f"imatrix.file={matrix}")
    assert "an importance matrix of another model: 128 columns for blk." in said
    assert ", which has 64" in said


@pytest.mark.parametrize("value", [1 << 40, (1 << 64) - 32])
def test_a_matrix_that_lies_about_its_sizes_is_refused(ready: Path, tmp_path: Path, value: int) -> None:
    raw = bytearray(the(ready, "imatrix/*/imatrix.gguf").read_bytes())
    name = b"blk.0.attn_q.weight.in_sum2"
    # After the name: u32 dimensions, u64 for each.
    at = raw.index(name) + len(name) + 4
    raw[at : at + 8] = value.to_bytes(8, "little")
    lying = tmp_path / "lying.gguf"
    lying.write_bytes(raw)
    with undone(ready, "imatrix"):
        said = refused(ready, "imatrix", "--set", f"imatrix.file={lying}")
    assert "lying.gguf" in said
    assert "in_sum2" in said


def test_too_little_calibration_text_is_told_in_tokens(ready: Path) -> None:
    with undone(ready, "imatrix"):
        said = refused(ready, "imatrix", "--set", "imatrix.context=1024")
    assert " tokens in 12 training rows, an importance matrix over contexts of 1024 needs 2048" in said
    assert "set imatrix.context to " in said


def test_a_weight_that_is_not_a_number_is_found_before_anything_is_made_of_it(ready: Path) -> None:
    path = the(ready, "merge/*/checkpoint/model.safetensors")
    good = path.read_bytes()
    raw = bytearray(good)
    (length,) = struct.unpack("<Q", raw[:8])
    name = "model.layers.0.mlp.up_proj.weight"
    entry = json.loads(raw[8 : 8 + length])[name]
    start = 8 + length + entry["data_offsets"][0]
    raw[start : start + 2] = {"F16": b"\x00\x7e", "BF16": b"\xc0\x7f"}[entry["dtype"]]
    path.write_bytes(raw)
    with undone(ready, "convert"):
        said = refused(ready, "convert")
    path.write_bytes(good)
    assert "model-f16.gguf: llama.cpp cannot load it" in said
    assert "blk.0.ffn_up.weight" in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (r"^output\.weight$=five", ["line 2", "no type 'five'"]),
        ("output.weight", ["line 2", "no type ''"]),
        ("(output=q6_k", ["line 2", "no regular expression"]),
    ],
    ids=["type", "no type", "expression"],
)
def test_a_plan_that_the_quantizer_would_not_understand_is_refused_with_its_line(
    ready: Path, tmp_path: Path, line: str, says: list[str]
) -> None:
    plan = tmp_path / "plan.txt"
    plan.write_text(f"^token_embd\\.weight$=q5_0\n{line}\n")
    with undone(ready, "quantize"):
        said = refused(ready, "quantize", "--set", f"quantize.plan={plan}", code=2)
    for word in ["plan.txt", *says]:
        assert word in said


def test_a_quantizer_killed_amid_its_file_is_told_and_the_next_run_makes_the_same_bytes(
    ready: Path, llama: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel kills it where its file grows beyond what the shell before it allowed."""
    good = the(ready, f"quantize/*/{quantize.OUTPUT}").read_bytes()
    build = tmp_path / "cache" / "llama.cpp" / llama.root.name
    (build / "bin").mkdir(parents=True)
    for path in [*llama.root.iterdir(), *llama.bin.iterdir()]:
        place = build / path.relative_to(llama.root)
        if path.name not in {"bin", "llama-quantize"}:
            place.symlink_to(path)
    script = build / "bin" / "llama-quantize"
    limit = len(good) // 2 // 512
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--dry-run*) ;; *) ulimit -f {limit};; esac\n'
        f'exec {llama.bin / "llama-quantize"} "$@"\n'
    )
    script.chmod(0o755)
    with undone(ready, "quantize"):
        with monkeypatch.context() as cache:
            cache.setenv("TOOLCHAIN_CACHE", str(tmp_path / "cache"))
            said = refused(ready, "quantize")
        assert "llama-quantize was killed by SIGXFSZ" in said
        assert "hint: full output: " in said
        again = toolchain(ready, "quantize")
        assert again.returncode == 0, again.stderr
        assert the(ready, f"quantize/*/{quantize.OUTPUT}").read_bytes() == good
        assert not list((ready.parent / "work" / "quantize").glob("*.partial"))


def test_a_matrix_that_is_given_is_recorded_with_its_tokens_and_digest(ready: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "given.gguf"
    shutil.copyfile(the(ready, f"imatrix/*/{imatrix.OUTPUT}"), matrix)
    with undone(ready, "imatrix"):
        ran = toolchain(ready, "imatrix", "--set", f"imatrix.file={matrix}")
        assert ran.returncode == 0, ran.stderr
        manifest = json.loads(the(ready, "imatrix/*/manifest.json").read_text())
    assert manifest["files"][imatrix.OUTPUT]["sha256"] == manifest["inputs"]["given"]
