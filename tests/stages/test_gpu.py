"""What only NVIDIA GPUs can show: Unsloth killed and resumed, two at once, a 4-bit teacher, a teacher in memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.stages.recipe_files import RECIPE, TOPICS, command
from tests.tiny import make_tiny_checkpoint

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.stages,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU_RECIPE = RECIPE.replace("checkpoint_every_steps = 3", "checkpoint_every_steps = 2\nlog_every_steps = 1").replace(
    'precision = "float32"\n', ""
)


def make_recipe(folder: Path, changes: dict[str, str] | None = None) -> Path:
    """The tiny recipe with rows of 256, which 4 bits and Unsloth's kernels can take."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_checkpoint(folder / "teacher", layers=3, hidden=256)
    for name, topics in (("train", TOPICS[:12]), ("held_out", TOPICS[12:])):
        rows = [{"question": f"What does {topic} do?", "answer": f"{topic} lists files."} for topic in topics]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = GPU_RECIPE
    for before, after in (changes or {}).items():
        assert before in text
        text = text.replace(before, after)
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def run(recipe: Path, until: str, *options: str) -> None:
    ran = subprocess.run(
        command(recipe, "run", "--until", until, *options), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def copy_of(recipe: Path, folder: Path, changes: dict[str, str] | None = None) -> Path:
    """Another recipe beside the same models and rows, with a copy of the work that was done."""
    folder.mkdir(parents=True)
    shutil.copytree(recipe.parent / "work", folder / "work")
    text = recipe.read_text()
    for before, after in (changes or {}).items():
        assert before in text
        text = text.replace(before, after)
    for name in ("teacher", "train.jsonl", "held_out.jsonl"):
        (folder / name).symlink_to(recipe.parent / name)
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose teacher has been captured."""
    recipe = make_recipe(tmp_path_factory.mktemp("captured"), {"epochs = 2": "epochs = 6"})
    run(recipe, "capture")
    return recipe


def manifest(recipe: Path, stage: str) -> dict[str, Any]:
    (found,) = (recipe.parent / "work" / stage).glob("*/manifest.json")
    content: dict[str, Any] = json.loads(found.read_text())
    return content


def log(recipe: Path, stage: str) -> list[dict[str, float]]:
    (found,) = (recipe.parent / "work" / stage).glob("*/log.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


def expect_the_same_losses(one: Path, other: Path, stage: str) -> None:
    expected, found = log(one, stage), log(other, stage)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=2e-2)
    assert expected[-1]["loss"] < expected[0]["loss"]


def kill_at_a_checkpoint(recipe: Path, stage: str) -> None:
    """kill -9 of the worker as soon as it has a whole checkpoint."""
    child = subprocess.Popen(command(recipe, "run", "--until", stage), stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while not list((recipe.parent / "work" / stage).glob("*.partial/resume/checkpoint-*/whole")):
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.005)
    (worker,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert child.wait() == 1


@pytest.mark.parametrize("bits", ["16", "4"])
def test_unsloth_is_killed_and_resumed_with_the_losses_of_a_quiet_run(
    captured: Path, tmp_path: Path, bits: str
) -> None:
    changes = {"epochs = 6": "epochs = 6\nload_in_4bit = true"} if bits == "4" else {}
    quiet, killed = (copy_of(captured, tmp_path / name, changes) for name in ("quiet", "killed"))
    run(quiet, "distill")
    assert manifest(quiet, "distill")["metrics"]["engine"] == "unsloth"
    kill_at_a_checkpoint(killed, "distill")
    run(killed, "merge")
    assert manifest(killed, "distill")["metrics"]["steps_resumed"] >= 2
    expect_the_same_losses(quiet, killed, "distill")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
def test_two_gpus_make_the_steps_of_one(captured: Path, tmp_path: Path, engine: str) -> None:
    """By torchrun, over NCCL: capture and distill."""
    changes = {"[distill]\n": f'[distill]\nengine = "{engine}"\n'}
    one, two = (copy_of(captured, tmp_path / name, changes) for name in ("one", "two"))
    run(one, "distill")
    shutil.rmtree(two.parent / "work" / "capture")
    run(two, "distill", "--launcher", f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2")
    for stage in ("capture", "distill"):
        assert manifest(two, stage)["metrics"]["processes"] == 2
    expect_the_same_losses(one, two, "distill")


def test_a_teacher_in_four_bits_answers_and_is_captured(tmp_path: Path) -> None:
    changes = {
        'model = "teacher"\n': 'model = "teacher"\nload_in_4bit = true\n',
        'answers = "dataset"': "max_new_tokens = 8",
        "[distill]": '[select]\ntruncated = "keep"\n[distill]',
    }
    recipe = make_recipe(tmp_path, changes)
    run(recipe, "distill")
    assert manifest(recipe, "generate")["metrics"]["device"].startswith("cuda")
    assert manifest(recipe, "capture")["metrics"]["device"].startswith("cuda")


def test_the_student_answers_and_the_teacher_scores(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, {"[imatrix]": "[on_policy]\nsteps = 4\nmax_new_tokens = 8\n[imatrix]"})
    run(recipe, "merge")
    assert manifest(recipe, "on_policy")["metrics"]["device"].startswith("cuda")


def test_uld_trains_with_the_teacher_in_memory(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, {"[distill]\n": '[distill]\nmethod = "uld"\ntemperature = 1.0\n'})
    run(recipe, "merge")
    assert manifest(recipe, "distill")["metrics"]["device"].startswith("cuda")
