"""teacher → student → generate → capture → distill → merge on tiny real models."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lines import Lines
from tests.tiny import make_tiny_checkpoint
from toolchain.data.rows import read_rows
from toolchain.errors import ArtifactError, GateError, ModelError, RecipeError
from toolchain.recipe import Capture, Data, Distill, Generate, Merge, Select, Student, Teacher
from toolchain.reporter import Silent

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.stages

TEMPERATURE = 2.0
QUESTIONS = [
    f"What does the command {name} do?" for name in ("ls", "cp", "mv", "scp", "tail", "ss", "git", "find", "range")
]
TRAINING = Distill(
    temperature=TEMPERATURE,
    lora_rank=4,
    lora_alpha=8.0,
    learning_rate=1e-2,
    epochs=4.0,
    batch_size=2,
    gradient_accumulation=2,
    precision="float32",
    checkpoint_every_steps=3,
    log_every_steps=5,
    lora_dropout=0.1,
)


def _fresh(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _data(folder: Path) -> tuple[Path, Path]:
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    rows = [{"question": text, "answer": f"It is number {at}."} for at, text in enumerate(QUESTIONS)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text(json.dumps({"question": "How do I delete a file?", "answer": "Use find."}) + "\n")
    return train, held_out


def _rows(made: dict[str, Path], out: Path) -> None:
    """train.jsonl and held_out.jsonl with the teacher's answers, in `out`/select."""
    from toolchain.teacher import generate, select

    data = Data(train=made["train"], held_out=made["held_out"])
    generate.run(
        Generate(max_new_tokens=12, batch_size=4),
        data,
        seed=1,
        teacher=made["teacher"],
        gguf=None,
        endpoint=None,
        load_in_4bit=False,
        llama=None,
        train=made["train"],
        held_out=made["held_out"],
        out=_fresh(out / "generate"),
        report=Silent(),
    )
    (out / "vocabulary.json").write_text(json.dumps({"verdict": "same", "ids": 512}))
    select.run(
        Select(truncated="keep"),
        data,
        max_new_tokens=12,
        answers=out / "generate" / generate.OUTPUT,
        student=made["base"],
        vocabulary=out / "vocabulary.json",
        embedding_model=None,
        out=_fresh(out / "select"),
        report=Silent(),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher of three layers, a student of two of them, rows, logits, an adapter and the base it is for."""
    from toolchain.student import base, distill
    from toolchain.teacher import capture

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("made")
    train, held_out = _data(root)
    made = {"root": root, "train": train, "held_out": held_out}
    made["teacher"] = make_tiny_checkpoint(root / "teacher", layers=3)
    base.prepare(Student(keep_layers=(0, 2)), model=made["teacher"], out=_fresh(root / "student"), report=Silent())
    made["base"] = root / "student" / "checkpoint"
    _rows(made, root)
    made["rows"] = root / "select" / "train.jsonl"
    made["held_out_rows"] = root / "select" / "held_out.jsonl"
    made["logits"] = _fresh(root / "capture")
    capture.run(
        Capture(top_k=16, batch_tokens=128),
        temperatures=(1.0, TEMPERATURE),
        teacher=made["teacher"],
        gguf=None,
        load_in_4bit=False,
        llama=None,
        vocabulary=_same_vocabulary(root / "vocabulary.json", made["teacher"]),
        rows=made["rows"],
        out=made["logits"],
        report=Silent(),
    )
    _distill(made, _fresh(root / "distill"), TRAINING)
    made["adapter"] = root / "distill" / "adapter"
    assert distill.newest_whole(root / "distill" / "resume") is not None
    return made


def _same_vocabulary(path: Path, teacher: Path) -> Path:
    from toolchain.student import vocabulary

    path.write_text(json.dumps(asdict(vocabulary.verdict(teacher, teacher))))
    return path


def _distill(made: dict[str, Path], out: Path, settings: Distill, report: Silent | None = None) -> dict[str, Any]:
    from toolchain.student import distill

    return distill.run(
        settings,
        engine="transformers",
        max_length=128,
        seed=3,
        base=made["base"],
        rows=made["rows"],
        logits=made["logits"] if settings.kl_weight else None,
        out=out,
        report=report or Silent(),
    )


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "resume" not in path.relative_to(folder).parts
    }


# --- teacher


def test_a_folder_is_checked_and_pointed_to(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.student import load
    from toolchain.teacher import checkpoint

    settings = Teacher(model=made["teacher"])
    figures = checkpoint.prepare(settings, model=made["teacher"], out=tmp_path, report=Silent())
    assert load.resolve(tmp_path) == made["teacher"].resolve()
    assert [path.name for path in tmp_path.iterdir()] == ["reference.json"]
    assert figures["parameters"] > 0


def test_a_reference_to_a_folder_that_has_gone_is_an_error(tmp_path: Path) -> None:
    from toolchain.student import load

    load.write_reference(tmp_path, tmp_path / "gone")
    with pytest.raises(ArtifactError, match="gone"):
        load.resolve(tmp_path)


def test_weights_only_as_pickle_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.student import load

    folder = tmp_path / "model"
    shutil.copytree(made["teacher"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle: loading one runs"):
        load.validate(folder)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_cut_off_shard_is_refused(made: dict[str, Path], tmp_path: Path, keep: int) -> None:
    from toolchain.student import load

    folder = tmp_path / "model"
    shutil.copytree(made["teacher"], folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*(bytes long|header)"):
        load.validate(folder)


def test_a_missing_template_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.student import load

    folder = tmp_path / "model"
    shutil.copytree(made["teacher"], folder)
    for path in folder.glob("*.jinja"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no chat template"):
        load.validate(folder)


def test_a_file_that_is_no_whole_gguf_is_refused(tmp_path: Path) -> None:
    from toolchain.teacher import checkpoint

    path = tmp_path / "cut.gguf"
    for content in (b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\x05" + b"\0" * 7, b"not a gguf file at all" * 9):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"not a whole GGUF|without tensors"):
            checkpoint.prepare(Teacher(model=path), model=path, out=tmp_path, report=Silent())
    with pytest.raises(ModelError, match="SHA-256"):
        checkpoint.prepare(Teacher(model=path, sha256="0" * 64), model=path, out=tmp_path, report=Silent())


# --- student


def test_kept_layers_give_the_same_logits_as_the_model_without_the_others(made: dict[str, Path]) -> None:
    from toolchain.student import load

    teacher, _ = load.load_model(made["teacher"], dtype=torch.float32, device="cpu")
    student, _ = load.load_model(made["base"], dtype=torch.float32, device="cpu")
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[0], teacher.model.layers[2]])
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = teacher(ids, use_cache=False).logits
        found = student(ids, use_cache=False).logits
    assert student.config.num_hidden_layers == 2
    assert torch.equal(found, expected)


def test_a_layer_that_is_not_there_is_named_with_the_count(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.student import base

    with pytest.raises(RecipeError, match=r"no layer 3: .* has 3, from 0 to 2"):
        base.prepare(Student(keep_layers=(0, 3)), model=made["teacher"], out=tmp_path, report=Silent())


# --- distill


def test_training_lowers_the_loss_and_says_so(made: dict[str, Path]) -> None:
    log = [json.loads(line) for line in (made["root"] / "distill" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))
    assert len(log) == 10  # 5 batches an epoch, 4 epochs, 2 batches a step
    assert log[-1]["divergence"] < log[0]["divergence"]
    assert log[0]["loss"] == pytest.approx(0.5 * log[0]["ce"] + 0.5 * TEMPERATURE**2 * log[0]["divergence"], rel=1e-5)
    rows = read_rows(made["rows"])
    assert sum(entry["tokens"] for entry in log) == 4 * sum(len(row.answer_ids) for row in rows)
    config = (made["adapter"] / "adapter_config.json").read_text()
    assert str(made["root"]) not in config
    assert sorted(path.name for path in made["adapter"].iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    done = made["root"] / "distill"
    newest = max((done / "resume").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    shutil.copytree(done / "resume", tmp_path / "resume")
    shutil.rmtree(tmp_path / "resume" / newest.name)
    # A checkpoint that a kill left half written: newer, and without the mark.
    half = tmp_path / "resume" / "checkpoint-10"
    half.mkdir(exist_ok=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    lines = Lines()
    metrics = _distill(made, tmp_path, TRAINING, lines)
    assert metrics["steps_resumed"] == 9
    assert _bytes(tmp_path) == _bytes(done)
    assert any(line.startswith("step 10/10  loss ") for line in lines.lines)


_KILLED = """
import sys, json, torch
from pathlib import Path
torch.set_num_threads(1)
from toolchain.recipe import Distill
from toolchain.reporter import Silent
from toolchain.student import distill
base, rows, logits, out, settings = sys.argv[1:]
distill.run(Distill.model_validate_json(settings), engine="transformers", max_length=128, seed=3,
            base=Path(base), rows=Path(rows), logits=Path(logits),
            out=Path(out), report=Silent())
"""


def test_a_run_killed_by_sigkill_and_started_again_ends_with_the_same_bytes(
    made: dict[str, Path], tmp_path: Path
) -> None:
    argv = [sys.executable, "-c", _KILLED, str(made["base"]), str(made["rows"]), str(made["logits"]), str(tmp_path)]
    child = subprocess.Popen([*argv, TRAINING.model_dump_json()], env={**os.environ, "OMP_NUM_THREADS": "1"})
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("resume/checkpoint-*/whole")):
        assert child.poll() is None, "the child ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "adapter").exists()
    metrics = _distill(made, tmp_path, TRAINING)
    assert metrics["steps_resumed"] >= 3
    assert _bytes(tmp_path) == _bytes(made["root"] / "distill")


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")


def _distill_job(made: dict[str, Path], out: Path, settings: Distill) -> dict[str, Any]:
    return {
        "stage": "distill",
        "settings": {"distill": settings.model_dump(mode="json"), "max_length": 128, "seed": 3},
        "inputs": {name: str(made[name]) for name in ("base", "rows", "logits")},
        "out": str(_fresh(out)),
    }


def _log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_on_one_host_or_two_make_the_steps_of_one(made: dict[str, Path], tmp_path: Path) -> None:
    """With batches of an odd number of rows, and one of a single row, of which one process has none."""
    from toolchain.student import distill
    from toolchain.worker import run_in_worker

    settings = TRAINING.model_copy(update={"lora_dropout": 0.0, "batch_size": 4, "gradient_accumulation": 1})
    _distill(made, _fresh(tmp_path / "one"), settings)
    job = _distill_job(made, tmp_path / "two", settings)
    metrics = run_in_worker(job, log=tmp_path / "two.log", report=Silent(), launcher=[*TORCHRUN, "2", "--standalone"])
    assert metrics["processes"] == 2
    assert distill.newest_whole(tmp_path / "two" / "resume") is not None

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    job = _distill_job(made, tmp_path / "hosts", settings)
    second = [*TORCHRUN, "1", *where, "--node-rank", "1", "-m", "toolchain.worker", "-", str(tmp_path / "job.json")]
    (tmp_path / "job.json").write_text(json.dumps(job))
    with subprocess.Popen(second, env={**os.environ, "OMP_NUM_THREADS": "1"}) as other:
        launcher = [*TORCHRUN, "1", *where, "--node-rank", "0"]
        metrics = run_in_worker(job, log=tmp_path / "hosts.log", report=Silent(), launcher=launcher)
        assert other.wait() == 0
    assert metrics["processes"] == 2

    one = _log(tmp_path / "one")
    for several in (_log(tmp_path / "two"), _log(tmp_path / "hosts")):
        assert [step["tokens"] for step in several] == [step["tokens"] for step in one]
        for name in ("loss", "ce", "divergence", "grad_norm"):
            np.testing.assert_allclose([s[name] for s in several], [s[name] for s in one], rtol=1e-3)


def test_an_error_of_one_of_several_processes_is_the_error_of_the_stage(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.worker import run_in_worker

    job = _distill_job(made, tmp_path / "out", TRAINING.model_copy(update={"temperature": 3.0}))
    with pytest.raises(ArtifactError, match="not 3"):
        run_in_worker(job, log=tmp_path / "log", report=Silent(), launcher=[*TORCHRUN, "2", "--standalone"])


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(
    made: dict[str, Path], tmp_path: Path
) -> None:
    settings = TRAINING.model_copy(update={"learning_rate": 1e30, "warmup_share": 0.0, "checkpoint_every_steps": 100})
    with pytest.raises(ModelError, match=r"at step \d+"):
        _distill(made, tmp_path, settings)
    assert not (tmp_path / "adapter").exists()


def test_without_kl_no_logits_are_needed(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = _distill(made, tmp_path, TRAINING.model_copy(update={"kl_weight": 0.0, "epochs": 1.0}))
    assert metrics["last"]["divergence"] == 0.0
    assert metrics["last"]["ce"] > 0


def test_gradient_checkpointing_gives_the_same_first_loss(made: dict[str, Path], tmp_path: Path) -> None:
    short = TRAINING.model_copy(update={"epochs": 1.0, "lora_dropout": 0.0})
    plain = _distill(made, _fresh(tmp_path / "plain"), short)
    again = _distill(made, _fresh(tmp_path / "checkpointed"), short.model_copy(update={"gradient_checkpointing": True}))
    assert again["last"]["loss"] == pytest.approx(plain["last"]["loss"], rel=1e-4)


def test_a_batch_counts_the_same_whole_or_accumulated(made: dict[str, Path], tmp_path: Path) -> None:
    short = TRAINING.model_copy(update={"epochs": 1.0, "lora_dropout": 0.0, "batch_size": 9})
    whole = short.model_copy(update={"gradient_accumulation": 1})
    parts = short.model_copy(update={"batch_size": 2, "gradient_accumulation": 5})
    one = _distill(made, _fresh(tmp_path / "one"), whole)
    five = _distill(made, _fresh(tmp_path / "five"), parts)
    assert one["steps"] == five["steps"] == 1
    assert five["first"]["loss"] == pytest.approx(one["first"]["loss"], rel=1e-5)
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "five")]
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4)


def test_logits_for_another_temperature_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"captured for temperatures \[1.0, 2.0\], not 3.0"):
        _distill(made, tmp_path, TRAINING.model_copy(update={"temperature": 3.0}))


def test_a_lora_target_that_is_not_there_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no layer 'query'"):
        _distill(made, tmp_path, TRAINING.model_copy(update={"lora_targets": ("q_proj", "query")}))


# --- merge


def _merge(
    made: dict[str, Path], out: Path, settings: Merge | None = None, *, load_in_4bit: bool = False, **other: Path
) -> dict[str, Any]:
    from toolchain.student import merge

    inputs = {"base": made["base"], "adapter": made["adapter"], "held_out": made["held_out_rows"], **other}
    return merge.run(settings or Merge(), load_in_4bit=load_in_4bit, **inputs, out=out, report=Silent())


def test_merged_model_and_adapter_give_the_same_logits(made: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    from toolchain.student import load

    figures = _merge(made, tmp_path)
    assert 0 <= figures["mean_kl"] < 1e-5
    assert figures["top1_agreement"] == 1.0
    base, _ = load.load_model(made["base"], dtype=torch.float32, device="cpu")
    merged, _ = load.load_model(tmp_path / "checkpoint", dtype=torch.float32, device="cpu")
    rows = read_rows(made["held_out_rows"])
    plain = next(load.answer_logprobs(base, rows, batch_tokens=512)).copy()
    adapted = PeftModel.from_pretrained(base, made["adapter"]).eval()
    expected = next(load.answer_logprobs(adapted, rows, batch_tokens=512))
    found = next(load.answer_logprobs(merged, rows, batch_tokens=512))
    assert np.abs(found - expected).max() < 2e-2
    assert np.abs(plain - expected).max() > 0.2, "the adapter changes nothing: the test proves nothing"


def test_tokenizer_template_and_special_tokens_survive_the_merge(made: dict[str, Path], tmp_path: Path) -> None:
    _merge(made, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "checkpoint" / name).read_bytes() == (made["base"] / name).read_bytes()
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["eos_token_id"] == 2
    assert config["dtype"] == "float16"


def test_a_merged_checkpoint_is_not_merged_onto_again(made: dict[str, Path], tmp_path: Path) -> None:
    _merge(made, _fresh(tmp_path / "once"))
    with pytest.raises(ModelError, match="already a merged checkpoint"):
        _merge(made, _fresh(tmp_path / "twice"), base=tmp_path / "once" / "checkpoint")


@pytest.mark.parametrize("shape", [{"layers": 3}, {"layers": 1}, {"layers": 2, "hidden": 128}])
def test_an_adapter_for_another_base_is_refused(made: dict[str, Path], tmp_path: Path, shape: dict[str, int]) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", **shape)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="not an adapter for"):
        _merge(made, _fresh(tmp_path / "out"), base=other)


@pytest.fixture
def too_large(made: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter whose merged weights are more than float16 can hold."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "adapter"
    shutil.copytree(made["adapter"], folder)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name and "layers.1" in name)
    weights[name] = weights[name] + 1e7
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_weight_too_large_for_float16_is_named(made: dict[str, Path], tmp_path: Path, too_large: Path) -> None:
    with pytest.raises(ModelError, match=r"layers\.1.* is more than float16 can hold") as caught:
        _merge(made, _fresh(tmp_path / "out"), Merge(dtype="float16"), adapter=too_large)
    assert "float32" in str(caught.value.hint)


def test_what_float16_cannot_hold_is_stored_as_float32_and_that_is_told(
    made: dict[str, Path], tmp_path: Path, too_large: Path
) -> None:
    figures = _merge(made, _fresh(tmp_path / "out"), adapter=too_large)
    assert figures["dtype"] == "float32"
    assert "more than float16 can hold" in figures["tried"]["float16"]["overflow"]
    assert "stored as float32" in figures["summary"]
    config = json.loads((tmp_path / "out" / "checkpoint" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_a_merge_that_loses_too_much_fails_its_gate(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"mean KL .* stored as float16"):
        _merge(made, tmp_path, Merge(dtype="float16", max_kl=1e-15))


# --- scores


def test_scores_do_not_depend_on_how_rows_are_batched(made: dict[str, Path]) -> None:
    from toolchain.student import load

    model, _ = load.load_model(made["base"], dtype=torch.float32, device="cpu")
    rows = read_rows(made["rows"])
    alone = list(load.answer_logprobs(model, rows, batch_tokens=1))
    together = list(load.answer_logprobs(model, rows, batch_tokens=4096))
    for row, one, many in zip(rows, alone, together, strict=True):
        assert one.shape == (len(row.answer_ids), model.config.vocab_size)
        assert one.dtype == np.float32
        assert np.abs(one - many).max() < 1e-4


def test_an_adapter_of_a_4_bit_base_is_folded_into_the_better_of_its_two_bases(
    made: dict[str, Path], tmp_path: Path
) -> None:
    from toolchain.student import load, merge

    _distill(made, _fresh(tmp_path / "distill"), TRAINING.model_copy(update={"load_in_4bit": True}))
    adapter = tmp_path / "distill" / "adapter"
    figures = _merge(made, _fresh(tmp_path / "merge"), load_in_4bit=True, adapter=adapter)
    bases = figures["bases"]
    better = min(bases, key=lambda name: bases[name]["cross_entropy"])
    assert figures["base"] == better
    assert bases["16-bit"]["kl_from_4bit"] > 1e-4
    assert figures["mean_kl"] <= 1e-5
    checkpoint = tmp_path / "merge" / "checkpoint"
    assert merge.onto_four_bits(checkpoint) == (better == "4-bit")
    for name in bases:
        # Each base's cross-entropy once more, from a fresh merge onto it.
        merged = merge.load_adapted(made["base"], adapter, four_bits=name == "4-bit").merge_and_unload()
        rows = read_rows(made["held_out_rows"])
        scores = load.answer_logprobs(merged, rows, batch_tokens=512)
        found = np.mean(
            [-row[at, token] for row, r in zip(scores, rows, strict=True) for at, token in enumerate(r.answer_ids)]
        )
        assert float(found) == pytest.approx(bases[name]["cross_entropy"], abs=1e-4)
