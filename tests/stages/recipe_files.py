"""A recipe for a tiny model and its files, and the command line to run it: shared by the tests of this folder."""

import json
import subprocess
import sys
from pathlib import Path

from tests.tiny import make_tiny_checkpoint

TOPICS = ("ls", "cp", "mv", "rm", "tail", "head", "find", "grep", "sort", "uniq", "wc", "cut", "tr", "ss", "git", "ps")
RECIPE = """
name = "tiny"
[teacher]
model = "teacher"
[student]
keep_layers = [0, 2]
[data]
train = "train.jsonl"
held_out = "held_out.jsonl"
max_length = 160
[generate]
answers = "dataset"
[distill]
epochs = 2
batch_size = 4
checkpoint_every_steps = 3
precision = "float32"
learning_rate = 1e-3
[imatrix]
context = 64
[evaluate]
max_kl_ratio = 1.5
[bundle]
context = 512
[bench]
prompt_tokens = 64
generated_tokens = 16
repetitions = 2
cold_starts = 2
"""


def make_recipe(folder: Path) -> Path:
    """recipe.toml with a three-layer teacher, 12 rows to train on and 4 held out."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_checkpoint(folder / "teacher", layers=3)
    for name, topics in (("train", TOPICS[:12]), ("held_out", TOPICS[12:])):
        rows = [
            {"question": f"What does the command {topic} do?", "answer": f"The command {topic} lists files, {number}."}
            for number, topic in enumerate(topics)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.toml"
    path.write_text(RECIPE)
    return path


def command(recipe: Path, verb: str, *options: str) -> list[str]:
    work = str(recipe.parent / "work")
    return [sys.executable, "-m", "toolchain.cli", verb, str(recipe), "--work", work, *options]


def toolchain(recipe: Path, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, verb, *options), capture_output=True, text=True, check=False)
