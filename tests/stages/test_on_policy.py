"""The phase in which the student answers and the teacher scores, on tiny real models."""

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

from tests.lines import Lines
from tests.tiny import make_tiny_checkpoint
from toolchain.data.rows import Message, Row, read_rows, write_rows
from toolchain.errors import DataError, HostError, ModelError
from toolchain.recipe import Distill, OnPolicy
from toolchain.reporter import Silent

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.stages

EOS = 2
PHASE = OnPolicy(steps=8, batch_size=3, learning_rate=1e-2, max_new_tokens=12, checkpoint_every_steps=3)
MIXED = PHASE.model_copy(update={"student_share": 0.5})
TRAINING = Distill(precision="float32", lora_rank=4, lora_alpha=8.0, lora_dropout=0.1, warmup_share=0.0)


def _rows(tokenizer: Any) -> list[Row]:
    from toolchain.teacher.generate import render

    rows = []
    for number in range(7):
        messages = (Message("user", f"What does the command {'ls ' * number}do?"),)
        prompt = render(tokenizer, messages, where="row")
        whole = render(tokenizer, messages, where="row", answer=f"It is number {number}.")
        answer = whole[len(prompt) : whole.index(EOS, len(prompt)) + 1]
        rows.append(Row(f"row-{number}", messages, f"It is number {number}.", prompt, answer, "stop"))
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, a student of fewer layers, an adapter from `distill`, and a finished phase."""
    from peft import LoraConfig, get_peft_model

    from toolchain.student import distill, load

    root = tmp_path_factory.mktemp("on_policy")
    made = {
        "teacher": make_tiny_checkpoint(root / "teacher", layers=3),
        "base": make_tiny_checkpoint(root / "base", layers=2),
        "adapter": root / "adapter",
        "rows": root / "rows.jsonl",
    }
    model, tokenizer = load.load_model(made["base"], dtype=torch.float32, device="cpu")
    write_rows(made["rows"], _rows(tokenizer))
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=sorted(TRAINING.lora_targets), task_type="CAUSAL_LM"
    )
    distill.save_adapter(get_peft_model(model, lora), made["adapter"])
    made["done"] = root / "done"
    _run(made, made["done"], MIXED)
    return made


def _run(
    made: dict[str, Path],
    out: Path,
    phase: OnPolicy = PHASE,
    training: Distill = TRAINING,
    report: Silent | None = None,
    max_length: int = 128,
) -> dict[str, Any]:
    from toolchain.pipeline import stage_called

    out.mkdir(exist_ok=True)
    settings = {
        "on_policy": phase.model_dump(mode="json"),
        "distill": training.model_dump(mode="json"),
        "load_teacher_in_4bit": False,
        "max_length": max_length,
        "seed": 3,
    }
    inputs = {name: made[name] for name in ("teacher", "base", "adapter", "rows")}
    return stage_called("on_policy").run_job(settings, inputs, out, report or Silent())


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _reverse_kl(made: dict[str, Path], adapter: Path) -> float:
    """Mean KL(student ‖ teacher) on the rows' answers, in float64."""
    from peft import PeftModel

    from toolchain.student import load

    teacher = load.load_model(made["teacher"], dtype=torch.float32, device="cpu")[0]
    student = PeftModel.from_pretrained(load.load_model(made["base"], dtype=torch.float32, device="cpu")[0], adapter)
    total = tokens = 0.0
    for row in read_rows(made["rows"]):
        ids = torch.tensor([row.token_ids])
        with torch.inference_mode():
            q, p = (
                model(ids).logits[0, len(row.prompt_ids) - 1 : -1].double().log_softmax(-1)
                for model in (student.eval(), teacher)
            )
        total += float((q.exp() * (q - p)).sum())
        tokens += len(row.answer_ids)
    return total / tokens


def test_the_phase_brings_the_student_nearer_to_the_teacher(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = _run(made, tmp_path, PHASE.model_copy(update={"steps": 30, "jsd_beta": 1.0}))
    assert _reverse_kl(made, tmp_path / "adapter") < 0.9 * _reverse_kl(made, made["adapter"])
    assert metrics["engine"] == "trl"
    assert metrics["steps"] == 30
    log = _log(tmp_path)
    assert [entry["step"] for entry in log] == list(range(1, 31))
    assert metrics["student_rows"] == sum(entry["student_rows"] for entry in log) > 0
    assert log[0]["loss"] == metrics["first"]["loss"]


def test_the_adapter_of_distill_is_gone_on_from(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _run(made, tmp_path, PHASE.model_copy(update={"steps": 1, "learning_rate": 1e-6}))
    before, after = (load_file(path / "adapter_model.safetensors") for path in (made["adapter"], tmp_path / "adapter"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    config = [
        json.loads((path / "adapter_config.json").read_text()) for path in (made["adapter"], tmp_path / "adapter")
    ]
    assert config[0]["lora_dropout"] == config[1]["lora_dropout"] == 0.1
    assert str(made["base"]) not in json.dumps(config[1])
    assert len(list((tmp_path / "adapter").iterdir())) == 2


def test_a_batch_holds_exactly_the_rows_tokens(made: dict[str, Path]) -> None:
    from toolchain.student.on_policy import Collator

    rows = read_rows(made["rows"])
    batch = Collator([rows[:2], rows[2:]], pad_id=3)([{"batch": 1}])
    for at, row in enumerate(rows[2:]):
        ids, mask = batch["input_ids"][at], batch["attention_mask"][at].bool()
        assert tuple(ids[mask].tolist()) == row.token_ids
        assert tuple(batch["labels"][at][batch["labels"][at] != -100].tolist()) == row.answer_ids
        assert tuple(ids[batch["labels"][at] != -100].tolist()) == row.answer_ids
        prompt_mask = batch["prompt_attention_mask"][at].bool()
        assert tuple(batch["prompts"][at][prompt_mask].tolist()) == row.prompt_ids
        assert bool(prompt_mask[-1]), "padding stands between a prompt and its answer"


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """What TRL gives for each batch that the student answers: token ids, attention mask, labels."""
    from trl.experimental.gkd import GKDTrainer

    seen: list[tuple[Any, Any, Any]] = []
    original = GKDTrainer.generate_on_policy_outputs

    def watch(model: Any, inputs: Any, config: Any) -> Any:
        seen.append(original(model, inputs, config))
        return seen[-1]

    monkeypatch.setattr(GKDTrainer, "generate_on_policy_outputs", staticmethod(watch))
    return seen


def _answers(seen: list[tuple[Any, Any, Any]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and answer of each row."""
    pairs = []
    for batch in seen:
        for ids, mask, labels in zip(*batch, strict=True):
            answer = tuple(labels[labels != -100].tolist())
            whole = tuple(ids[mask.bool()].tolist())
            assert whole[-len(answer) :] == answer
            pairs.append((whole[: -len(answer)], answer))
    return pairs


def test_what_the_student_is_asked_is_the_prompt_and_its_answer_ends_at_eos(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _watched(monkeypatch)
    metrics = _run(made, tmp_path, PHASE.model_copy(update={"max_new_tokens": 60, "sampling_temperature": 3.0}))
    prompts = {row.prompt_ids for row in read_rows(made["rows"])}
    ended = 0
    for prompt, answer in _answers(seen):
        assert prompt in prompts
        assert EOS not in answer[:-1]
        assert answer[-1] == EOS or len(answer) == 60
        ended += answer[-1] == EOS
    assert 0 < ended == metrics["ended_rows"]


def test_with_a_share_of_zero_the_rows_own_answers_are_learnt(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.student import on_policy

    metrics = _run(made, tmp_path, PHASE.model_copy(update={"student_share": 0.0}))
    assert metrics["student_rows"] == 0
    batches = on_policy.plan(read_rows(made["rows"]), PHASE, TRAINING, seed=3)
    assert [entry["answer_tokens"] for entry in _log(tmp_path)] == [
        sum(len(row.answer_ids) for row in batch) for batch in batches
    ]


@pytest.mark.parametrize(("beta", "share"), [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.3, 1.0)])
def test_the_loss_is_the_generalised_jensen_shannon_divergence_per_answer_token(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beta: float, share: float
) -> None:
    from toolchain.student import load, on_policy

    seen = _watched(monkeypatch)
    phase = PHASE.model_copy(update={"student_share": share, "steps": 1, "jsd_beta": beta})
    _run(made, tmp_path, phase)
    (batch,) = on_policy.plan(read_rows(made["rows"]), phase, TRAINING, seed=3)
    answers = [(row.prompt_ids, row.answer_ids) for row in batch] if share == 0 else _answers(seen)
    assert len(answers) == len(batch)
    # The adapter's second factors are zero, so that the first step sees the base.
    models = [load.load_model(made[name], dtype=torch.float32, device="cpu")[0] for name in ("base", "teacher")]
    total = 0.0
    for prompt, answer in answers:  # one by one: no padding
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            q, p = (model(ids).logits[0, len(prompt) - 1 : -1].double().softmax(-1) for model in models)
        mixed = beta * p + (1 - beta) * q
        if beta in (0.0, 1.0):
            total += float((p * (p / q).log() if beta == 0.0 else q * (q / p).log()).sum())
        else:
            total += float((beta * p * (p / mixed).log() + (1 - beta) * q * (q / mixed).log()).sum())
    assert _log(tmp_path)[0]["loss"] == pytest.approx(total / sum(len(answer) for _, answer in answers), rel=1e-5)


def test_a_share_between_mixes_both(made: dict[str, Path]) -> None:
    own = [entry["student_rows"] > 0 for entry in _log(made["done"])]
    assert 0 < sum(own) < len(own) == MIXED.steps


def test_four_bits_train_a_float32_adapter(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from toolchain.pipeline import stage_called

    settings = {
        "on_policy": PHASE.model_copy(update={"steps": 2, "learning_rate": 1e-6}).model_dump(mode="json"),
        "distill": TRAINING.model_copy(update={"load_in_4bit": True}).model_dump(mode="json"),
        "load_teacher_in_4bit": True,
        "max_length": 128,
        "seed": 3,
    }
    inputs = {name: made[name] for name in ("teacher", "base", "adapter", "rows")}
    metrics = stage_called("on_policy").run_job(settings, inputs, tmp_path, Silent())
    assert 0 < metrics["last"]["loss"] < 1
    before, after = (load_file(path / "adapter_model.safetensors") for path in (made["adapter"], tmp_path / "adapter"))
    # In bfloat16 steps of this size round away, and what is not zero would come back rounded.
    changes = [float((after[name] - before[name]).abs().max()) for name in before]
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert all(change < 1e-5 for change in changes)
    assert any(change > 0 for name, change in zip(before, changes, strict=True) if "lora_A" in name)


def test_prompt_and_answer_stay_within_the_longest_length(made: dict[str, Path], tmp_path: Path) -> None:
    rows = read_rows(made["rows"])
    longest = max(len(row.token_ids) for row in rows)
    _run(made, tmp_path, PHASE.model_copy(update={"max_new_tokens": 500}), max_length=longest)
    shortest = min(len(row.prompt_ids) for row in rows)
    assert max(entry["answer_tokens"] for entry in _log(tmp_path)) <= PHASE.batch_size * (longest - shortest)


def test_models_of_unequal_width_meet_over_the_ids_in_common(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.student import load

    wide = make_tiny_checkpoint(tmp_path / "wide", layers=3, vocabulary=576)
    metrics = _run({**made, "teacher": wide}, tmp_path / "teacher")
    ids = len(load.load_tokenizer(wide))
    assert metrics["common_ids"] == ids
    assert metrics["last"]["loss"] > 0
    base = make_tiny_checkpoint(tmp_path / "base", layers=2, vocabulary=576)
    # The student's own answers must not hold ids that the narrower teacher has no row for.
    metrics = _run(
        {**made, "base": base}, tmp_path / "student", PHASE.model_copy(update={"sampling_temperature": 50.0})
    )
    assert metrics["answer_tokens"] > 100


_KILLED = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from toolchain.recipe import Distill, OnPolicy
from toolchain.reporter import Silent
from toolchain.student import on_policy
teacher, base, adapter, rows, out, phase, training = sys.argv[1:]
on_policy.run(OnPolicy.model_validate_json(phase), Distill.model_validate_json(training), load_teacher_in_4bit=False,
              max_length=128, seed=3, teacher=Path(teacher), base=Path(base), adapter=Path(adapter), rows=Path(rows),
              out=Path(out), report=Silent())
"""


def test_a_run_killed_by_sigkill_and_started_again_ends_with_the_same_bytes(
    made: dict[str, Path], tmp_path: Path
) -> None:
    paths = [str(made[name]) for name in ("teacher", "base", "adapter", "rows")]
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, *paths, str(tmp_path), MIXED.model_dump_json(), TRAINING.model_dump_json()],
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
    half = tmp_path / "resume" / "checkpoint-8"
    half.mkdir(exist_ok=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    lines = Lines()
    metrics = _run(made, tmp_path, MIXED, report=lines)
    assert metrics["steps_resumed"] >= 3
    for name in ("log.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (made["done"] / name).read_bytes()
    assert any(line.startswith("step 8/8  divergence ") for line in lines.lines)


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


def test_memory_that_runs_out_names_what_to_lower(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.student import on_policy

    def runs_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(on_policy._Trainer, "compute_loss", runs_out)
    with pytest.raises(HostError, match="memory is used up at step 1") as caught:
        _run(made, tmp_path)
    assert "on_policy.batch_size or on_policy.max_new_tokens" in str(caught.value.hint)


def test_rows_and_adapters_that_cannot_be_used_are_named(made: dict[str, Path], tmp_path: Path) -> None:
    row = read_rows(made["rows"])[0]
    bad = tmp_path / "rows.jsonl"
    write_rows(bad, [Row("far", row.messages, row.answer, row.prompt_ids, (600, EOS), "stop")])
    with pytest.raises(ModelError, match="row far: token 600, but teacher and student have only ids below"):
        _run({**made, "rows": bad}, tmp_path / "out")
    bad.write_text("")
    with pytest.raises(DataError, match="no rows"):
        _run({**made, "rows": bad}, tmp_path / "out")
    with pytest.raises(DataError, match=r"leaves no room for an answer; data.max_length is 16"):
        _run(made, tmp_path / "out", max_length=16)
    shutil.copytree(made["adapter"], tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="not a safetensors file: 4 bytes long"):
        _run({**made, "adapter": tmp_path / "adapter"}, tmp_path / "out")
