"""What only an NVIDIA GPU can show: Unsloth killed and resumed, a 4-bit teacher, phases with a teacher in memory."""

import json
import os
import signal
import subprocess
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


def run(recipe: Path, until: str) -> None:
    ran = subprocess.run(command(recipe, "run", "--until", until), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def manifest(recipe: Path, stage: str) -> dict[str, Any]:
    (found,) = (recipe.parent / "work" / stage).glob("*/manifest.json")
    content: dict[str, Any] = json.loads(found.read_text())
    return content


def log(recipe: Path, stage: str) -> list[dict[str, float]]:
    (found,) = (recipe.parent / "work" / stage).glob("*/log.jsonl")
    return [json.loads(line) for line in found.read_text().splitlines()]


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
def test_unsloth_is_killed_and_resumed_with_the_losses_of_a_quiet_run(tmp_path: Path, bits: str) -> None:
    changes = {"epochs = 2": "epochs = 6" + ("\nload_in_4bit = true" if bits == "4" else "")}
    quiet, killed = (make_recipe(tmp_path / name, changes) for name in ("quiet", "killed"))
    run(quiet, "merge")
    assert manifest(quiet, "distill")["metrics"]["engine"] == "unsloth"
    run(killed, "capture")
    kill_at_a_checkpoint(killed, "distill")
    run(killed, "merge")
    assert manifest(killed, "distill")["metrics"]["steps_resumed"] >= 2
    expected, found = log(quiet, "distill"), log(killed, "distill")
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=2e-2)
    assert expected[-1]["loss"] < expected[0]["loss"]


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
