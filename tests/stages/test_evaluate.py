"""The ledger on tiny models: a teacher of the same tokens, one that llama.cpp runs, another tokenizer, none at all."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from tests.stages.gguf_files import to_gguf
from tests.tiny import make_tiny_checkpoint
from toolchain.data.rows import Row, write_rows
from toolchain.evaluate import ledger
from toolchain.evaluate.gates import GateLimits, check_gates, failed_gates
from toolchain.gguf import convert
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Merge
from toolchain.reporter import Silent
from toolchain.student import load, merge, vocabulary

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]

QUESTIONS = ("What does ls do?", "How do I copy a file?", "Which command ends a process?", "What is a branch?")
FORMS = ["student before", "student after", "merged", "GGUF 16-bit", "GGUF F16"]


@pytest.fixture(scope="module")
def made(llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `evaluate` reads, for a student whose adapter is a random one; the 16-bit GGUF stands for the quantized."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluate")
    teacher = make_tiny_checkpoint(root / "teacher", layers=3)
    student = make_tiny_checkpoint(root / "student", seed=1)
    adapter, merged = root / "adapter", root / "checkpoint"
    _random_adapter(student, adapter)
    write_rows(root / "held_out.jsonl", _rows(student))
    merge.run(
        Merge(dtype="float32"),
        load_in_4bit=False,
        base=student,
        adapter=adapter,
        held_out=root / "held_out.jsonl",
        out=root,
        report=Silent(),
    )
    for name, model in (("gguf", merged), ("gguf_teacher", teacher)):
        (root / name).mkdir()
        to_gguf(model, root / name, llama)
    (root / "quantize.json").write_text('{"file_type": "F16"}')
    vocabulary.run(method="logits", on_policy=False, teacher=teacher, student=student, out=root)
    return {
        "held_out": root / "held_out.jsonl",
        "vocabulary": root / vocabulary.OUTPUT,
        "teacher": teacher,
        "student": student,
        "adapter": adapter,
        "merged": merged,
        "gguf_16bit": root / "gguf" / convert.OUTPUT,
        "gguf_quantized": root / "gguf" / convert.OUTPUT,
        "gguf_teacher": root / "gguf_teacher" / convert.OUTPUT,
        "quantize_facts": root / "quantize.json",
    }


def _random_adapter(base: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = load.load_model(base, dtype=torch.float32, device="cpu")
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    adapted.save_pretrained(folder)


def _rows(student: Path) -> list[Row]:
    tokenizer = load.load_tokenizer(student)
    rows = []
    for at, text in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        answer = tokenizer(f"It is command {at}.<|im_end|>")["input_ids"]
        rows.append(Row(str(at), (), "", tuple(prompt), tuple(answer), "stop"))
    return rows


def _evaluate(inputs: dict[str, Path], llama: LlamaCpp, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ledger, and its rows by name."""
    out.mkdir(exist_ok=True)
    metrics = ledger.run(
        batch_tokens=512, load_teacher_in_4bit=False, inputs=inputs, llama=llama, out=out, report=Silent()
    )
    found = json.loads((out / "ledger.json").read_text())
    assert metrics["summary"]
    assert [path.name for path in out.iterdir()] == ["ledger.json"]
    return found, {row["name"]: row for row in found["rows"]}


def _without(inputs: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: path for name, path in inputs.items() if name not in names}


def _gates(found: dict[str, Any]) -> list[str]:
    limits = GateLimits(distill_max_kl_ratio=1e-9, distill_max_ce_ratio=1e-9, merge_max_kl=1e-3, convert_max_kl=1e-2)
    return [gate.name for gate in failed_gates(check_gates(found, limits))]


def test_a_teacher_of_the_same_tokens_is_the_first_row_and_what_counts_is_kl_to_it(
    made: dict[str, Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    found, rows = _evaluate(_without(made, "gguf_teacher"), llama, tmp_path / "out")
    assert list(rows) == ["teacher", *FORMS]
    assert rows["teacher"]["kl_to_teacher"] == 0.0
    assert rows["student before"]["kl_to_teacher"] > 0.01
    assert rows["merged"]["kl_to_previous"] < 1e-6
    assert found["gain"]["low"] <= found["gain"]["difference"] <= found["gain"]["high"]
    assert _gates(found) == ["KL to the teacher after ÷ before distillation"]


def test_a_gguf_teacher_is_scored_by_llama_cpp_and_its_folder_needs_no_weights(
    made: dict[str, Path], llama: LlamaCpp, tmp_path: Path
) -> None:
    _, by_transformers = _evaluate(_without(made, "gguf_teacher"), llama, tmp_path / "one")
    folder = tmp_path / "teacher"
    load.load_tokenizer(made["teacher"]).save_pretrained(folder)
    _, by_llama_cpp = _evaluate({**made, "teacher": folder}, llama, tmp_path / "other")
    for name in ("student before", "GGUF 16-bit"):
        kl = by_transformers[name]["kl_to_teacher"]
        assert by_llama_cpp[name]["kl_to_teacher"] == pytest.approx(kl, rel=0.02)
    assert by_llama_cpp["teacher"]["bytes"] == made["gguf_teacher"].stat().st_size


@pytest.mark.parametrize("why", ["different", "unknown", "prompts"])
def test_without_common_rows_there_is_no_kl_to_the_teacher_and_what_counts_is_cross_entropy(
    made: dict[str, Path], llama: LlamaCpp, tmp_path: Path, why: str
) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", vocabulary=512 if why == "prompts" else 320)
    if why == "prompts":
        (other / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    teacher = None if why == "unknown" else other
    vocabulary.run(method="answers", on_policy=False, teacher=teacher, student=made["student"], out=tmp_path)
    inputs = {**_without(made, "gguf_teacher", "teacher"), "vocabulary": tmp_path / vocabulary.OUTPUT}
    found, rows = _evaluate({**inputs, "teacher": teacher} if teacher else inputs, llama, tmp_path / "out")
    assert list(rows) == FORMS
    assert all(row["kl_to_teacher"] is None and row["top1_agreement"] is None for row in rows.values())
    assert rows["merged"]["kl_to_previous"] < 1e-6
    assert rows["GGUF 16-bit"]["kl_to_previous"] < 1e-2
    assert found["gain"]["judged_by"] == "cross_entropy"
    assert found["tokenizers"]["verdict"] == ("same" if why == "prompts" else why)
    assert _gates(found) == ["cross-entropy of the held-out answers after ÷ before distillation"]
    _, with_teacher = _evaluate(_without(made, "gguf_teacher"), llama, tmp_path / "with")
    for name in FORMS:
        assert rows[name]["cross_entropy"] == pytest.approx(with_teacher[name]["cross_entropy"], abs=1e-6)
