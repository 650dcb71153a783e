"""Distillation from a teacher with another tokenizer, on tiny real models."""

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

from tests.tiny import give_byte_level_tokenizer, make_tiny_checkpoint
from toolchain.data.rows import Message, Row, write_rows
from toolchain.errors import DataError, ModelError, RecipeError
from toolchain.recipe import Distill
from toolchain.reporter import Silent

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.stages

ANSWERS = ("It lists the files.", "Use scp, né 🙂?", "Run ss with the option", "It prints the end of a file.", "42")
TRAINING = Distill(
    method="uld",
    temperature=1.0,
    ce_weight=0.0,
    kl_weight=1.0,
    lora_rank=4,
    lora_alpha=8.0,
    lora_dropout=0.1,
    learning_rate=1e-2,
    epochs=16.0,
    batch_size=2,
    gradient_accumulation=2,
    precision="float32",
    checkpoint_every_steps=3,
    log_every_steps=5,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher with a byte-level tokenizer, a student with a SentencePiece one, rows in the student's tokens."""
    from toolchain.student import load
    from toolchain.teacher.generate import render

    root = tmp_path_factory.mktemp("uld")
    made = {
        "teacher": give_byte_level_tokenizer(make_tiny_checkpoint(root / "teacher", layers=3, seed=5)),
        "base": make_tiny_checkpoint(root / "base"),
        "rows": root / "rows.jsonl",
    }
    tokenizer = load.load_tokenizer(made["base"])
    rows = []
    for number, answer in enumerate(ANSWERS):
        messages = (Message("user", f"What does the command do? {'Say. ' * number}"),)
        prompt = render(tokenizer, messages, where="row")
        whole = render(tokenizer, messages, where="row", answer=answer)
        end = whole.index(tokenizer.eos_token_id, len(prompt))
        finish: Any = "length" if number == 2 else "stop"
        ids = whole[len(prompt) : end + (finish == "stop")]
        rows.append(Row(f"row-{number}", messages, answer, prompt, ids, finish))
    write_rows(made["rows"], rows)
    made["done"] = root / "done"
    _run(made, made["done"])
    return made


def _job(made: dict[str, Path], out: Path, settings: Distill, max_length: int = 128) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return {
        "stage": "distill",
        "settings": {"distill": settings.model_dump(mode="json"), "max_length": max_length, "seed": 3},
        "inputs": {name: str(made[name]) for name in ("teacher", "base", "rows")},
        "out": str(out),
    }


def _run(made: dict[str, Path], out: Path, settings: Distill = TRAINING, max_length: int = 128) -> dict[str, Any]:
    from toolchain.pipeline import stage_called

    job = _job(made, out, settings, max_length)
    inputs = {name: Path(path) for name, path in job["inputs"].items()}
    return stage_called("distill").run_job(job["settings"], inputs, out, Silent())


def _rows(made: dict[str, Path]) -> list[Row]:
    from toolchain.data.rows import read_rows

    return read_rows(made["rows"])


def _pairs(made: dict[str, Path]) -> list[Any]:
    from toolchain.student import load, uld

    student, teacher = load.load_tokenizer(made["base"]), load.load_tokenizer(made["teacher"])
    return [uld.pair(row, student, teacher, load.stop_ids(made["teacher"], teacher)) for row in _rows(made)]


# --- the pair


def test_both_sides_of_a_pair_write_the_same_answer_and_end_alike(made: dict[str, Path]) -> None:
    from toolchain.student import load

    tokenizer = load.load_tokenizer(made["teacher"])
    pairs = _pairs(made)
    assert len(pairs) == len(ANSWERS)
    for found, answer in zip(pairs, ANSWERS, strict=True):
        assert tokenizer.decode(found.teacher.answer_ids, skip_special_tokens=True) == f" {answer}"
        assert tokenizer.decode(found.teacher.prompt_ids).startswith("<s>[INST] What does")
        assert (found.teacher.answer_ids[-1] == tokenizer.eos_token_id) == (found.student.finish == "stop")
        assert found.student_ends[-1] == found.teacher_ends[-1] == len(answer.encode())
        assert list(found.teacher_ends) == sorted(found.teacher_ends)
    assert any(len(found.student_ends) != len(found.teacher_ends) for found in pairs), "the tokenizers cut alike"


def test_tokens_end_where_their_text_ends_in_bytes(made: dict[str, Path]) -> None:
    from toolchain.student import load, uld

    text = " It né 🙂 is number"
    for name in ("base", "teacher"):
        tokenizer = load.load_tokenizer(made[name])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = uld.text_ends(tokenizer, ids)
        whole = text.lstrip().encode()
        for at, end in enumerate(ends):
            seen = tokenizer.decode(ids[: at + 1]).lstrip().rstrip("\ufffd")
            assert whole[:end].decode() == seen
        assert ends[-1] == len(whole)
    assert len(ids) > len(set(ends)), "no token ended within a character: the test shows less than it says"


def test_a_template_that_ends_no_turn_is_named(made: dict[str, Path]) -> None:
    from toolchain.student import load, uld

    tokenizer = load.load_tokenizer(made["teacher"])
    with pytest.raises(ModelError, match="ends the answer without an eos token"):
        uld.pair(_rows(made)[0], load.load_tokenizer(made["base"]), tokenizer, stops=(300,))


# --- the loss


def _reference(student: Any, teacher: Any, found: Any) -> float:
    """The loss from its definition, in float64: groups up to a common end, chain rule within them, sorted L1."""
    sides = []
    for logits, row, ends in (
        (student, found.student, found.student_ends),
        (teacher, found.teacher, found.teacher_ends),
    ):
        sides.append((logits.double().softmax(-1), row.answer_ids, list(ends)))
    at = [0, 0]
    open_: list[list[int]] = [[], []]
    total, groups = 0.0, 0
    while at[0] < len(sides[0][1]) and at[1] < len(sides[1][1]):
        ends = [sides[0][2][at[0]], sides[1][2][at[1]]]
        for side in (0, 1):
            if ends[side] <= ends[1 - side]:
                open_[side].append(at[side])
                at[side] += 1
        if ends[0] != ends[1]:
            continue
        merged = []
        for side in (0, 1):
            p, ids, _ = sides[side]
            mass = 1.0
            for position in open_[side][:-1]:
                mass *= float(p[position, ids[position]])
            merged.append(sorted((mass * p[open_[side][-1]]).tolist(), reverse=True))
        width = max(map(len, merged))
        padded = [values + [0.0] * (width - len(values)) for values in merged]
        total += sum(abs(a - b) for a, b in zip(*padded, strict=True))
        groups += 1
        open_ = [[], []]
    return total / groups


def _logits(found: Any, seed: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(len(found.student.answer_ids), 512, generator=generator)
    teacher = 2 * torch.randn(len(found.teacher.answer_ids), 320, generator=generator)
    return student, teacher


def test_the_loss_is_that_of_the_definition(made: dict[str, Path]) -> None:
    from toolchain.student import uld

    for seed, found in enumerate(_pairs(made)):
        student, teacher = _logits(found, seed)
        loss = uld.AlignedULD(1.0).of(student, teacher, found)
        assert float(loss) == pytest.approx(_reference(student, teacher, found), rel=1e-5)


def test_the_one_product_gives_trls_own_groups_and_gradient(made: dict[str, Path]) -> None:
    from trl.experimental.gold.gold_trainer import ULDLoss

    from toolchain.student import uld

    ours = uld.AlignedULD(2.0)
    found = _pairs(made)[1]
    probs = _logits(found, 0)[1].softmax(-1)
    groups = [[0], [1, 2, 3], [4, 5], [6]]
    values, gradients = [], []
    for merge in (
        ULDLoss._merge_probabilities_with_alignment_groups,
        type(ours)._merge_probabilities_with_alignment_groups,
    ):
        leaf = probs.clone().requires_grad_()
        merged = merge(ours, leaf, groups, list(found.teacher.answer_ids))
        (merged**2).sum().backward()
        values.append(merged.detach())
        gradients.append(leaf.grad)
    assert torch.allclose(values[1], values[0], rtol=1e-4, atol=0)
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-12)
    assert float(values[0][1].sum()) < 1.0, "a group of several tokens has less than the whole mass"


# --- the stage


def test_the_loss_falls_and_the_adapter_is_no_longer_the_first_one(made: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    log = [json.loads(line) for line in (made["done"] / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))
    assert sum(entry["divergence"] for entry in log[-4:]) < 0.8 * sum(entry["divergence"] for entry in log[:4])
    assert sum(entry["tokens"] for entry in log) == 16 * sum(len(row.answer_ids) for row in _rows(made))
    weights = load_file(made["done"] / "adapter" / "adapter_model.safetensors")
    # LoRA's second factors start at zero.
    assert all(float(weight.abs().max()) > 0 for name, weight in weights.items() if "lora_B" in name)


def test_cross_entropy_joins_with_its_weight(made: dict[str, Path], tmp_path: Path) -> None:
    _run(made, tmp_path, TRAINING.model_copy(update={"ce_weight": 0.5, "kl_weight": 2.0, "epochs": 1.0}))
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert entry["ce"] > 0
    assert entry["loss"] == pytest.approx(0.5 * entry["ce"] + 2.0 * entry["divergence"], rel=1e-5)


def test_a_batch_counts_the_same_whole_or_accumulated(made: dict[str, Path], tmp_path: Path) -> None:
    plain = {"epochs": 1.0, "lora_dropout": 0.0, "ce_weight": 1.0}
    _run(made, tmp_path / "one", TRAINING.model_copy(update={**plain, "batch_size": 5, "gradient_accumulation": 1}))
    _run(made, tmp_path / "parts", TRAINING.model_copy(update={**plain, "batch_size": 2, "gradient_accumulation": 3}))
    one, parts = (json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "parts"))
    for name in ("loss", "ce", "divergence", "grad_norm"):
        assert parts[name] == pytest.approx(one[name], rel=1e-4)


def test_two_processes_make_the_steps_of_one(made: dict[str, Path], tmp_path: Path) -> None:
    """With a batch of a single row, of which one process has none."""
    from toolchain.worker import run_in_worker

    settings = TRAINING.model_copy(
        update={"lora_dropout": 0.0, "batch_size": 4, "gradient_accumulation": 1, "epochs": 2.0, "ce_weight": 1.0}
    )
    _run(made, tmp_path / "one", settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = _job(made, tmp_path / "two", settings)
    metrics = run_in_worker(job, log=tmp_path / "two.log", report=Silent(), launcher=launcher)
    assert metrics["processes"] == 2
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [step["tokens"] for step in two] == [step["tokens"] for step in one]
    for name in ("loss", "ce", "divergence", "grad_norm"):
        assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=1e-3)


_KILLED = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from toolchain.recipe import Distill
from toolchain.reporter import Silent
from toolchain.student import uld
teacher, base, rows, out, settings = sys.argv[1:]
uld.run(Distill.model_validate_json(settings), max_length=128, seed=3, teacher=Path(teacher), base=Path(base),
        rows=Path(rows), out=Path(out), report=Silent())
"""


def test_a_run_killed_by_sigkill_and_started_again_ends_with_the_same_bytes(
    made: dict[str, Path], tmp_path: Path
) -> None:
    paths = [str(made[name]) for name in ("teacher", "base", "rows")]
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, *paths, str(tmp_path), TRAINING.model_dump_json()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("resume/checkpoint-*/whole")):
        assert child.poll() is None, "the child ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "adapter").exists()
    metrics = _run(made, tmp_path)
    assert metrics["steps_resumed"] >= 3
    for name in ("log.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (made["done"] / name).read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(made["teacher"], teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the loss is nan at step 1"):
        _run({**made, "teacher": teacher}, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_row_that_is_too_long_and_a_layer_that_is_not_there_are_named(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row row-0 has \d+ tokens; data.max_length is 16"):
        _run(made, tmp_path, max_length=16)
    with pytest.raises(RecipeError, match="no layer 'query'"):
        _run(made, tmp_path, TRAINING.model_copy(update={"lora_targets": ("query",)}))
