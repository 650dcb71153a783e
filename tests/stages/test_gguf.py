"""Convert, importance matrix, quantize and score on tiny checkpoints, by the pinned llama.cpp."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from tests.stages.gguf_files import to_gguf, to_matrix
from tests.tiny import give_byte_level_tokenizer, make_tiny_checkpoint
from toolchain import errors
from toolchain.data.rows import Row, write_rows
from toolchain.evaluate.divergence import kl
from toolchain.gguf import convert, imatrix, quantize, score
from toolchain.gguf.checkpoint import PROBES
from toolchain.gguf.ggml import read_importance
from toolchain.gguf.header import read_facts, read_metadata
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Card, FileType, Imatrix, Quantize
from toolchain.reporter import Silent

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]

NAME = "tiny-7b-instruct"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 256 wide, so that every K-quant fits; ids that no token has at the end of the vocabulary."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", hidden=256, vocabulary=520)


@pytest.fixture(scope="module")
def converted(checkpoint: Path, llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("convert")
    to_gguf(checkpoint, out, llama, name=NAME)
    return out / convert.OUTPUT


@pytest.fixture(scope="module")
def rows(checkpoint: Path) -> list[Row]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    made = []
    for i in range(12):
        chat = [{"role": "user", "content": f"How do I copy file {i} to another machine?"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        answer = tokenizer(f"Use scp with file {i} first.<|im_end|>")["input_ids"]
        made.append(Row(str(i), (), "", tuple(prompt), tuple(answer), "stop"))
    return made


@pytest.fixture(scope="module")
def matrix(
    converted: Path, checkpoint: Path, rows: list[Row], llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_matrix(converted, checkpoint, rows, llama, tmp_path_factory.mktemp("imatrix"))


def make_matrix(gguf: Path, checkpoint: Path, rows: Sequence[Row], llama: LlamaCpp, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    write_rows(out / "train.jsonl", rows)
    return to_matrix(gguf, out / "train.jsonl", checkpoint, llama, out)


def reference(checkpoint: Path, rows: Sequence[Row]) -> list[npt.NDArray[np.float64]]:
    """The same log-probabilities by Transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row.token_ids])).logits[0].double()
            found.append(logits.log_softmax(-1).numpy()[len(row.prompt_ids) - 1 : -1])
    return found


def mean_kl(expected: Sequence[npt.NDArray[np.float64]], found: Sequence[npt.NDArray[np.float32]]) -> float:
    parts = [(np.exp(p) * (p - q)).sum(-1) for p, q in zip(expected, found, strict=True)]
    return float(np.concatenate(parts).mean())


def test_the_gguf_predicts_what_the_checkpoint_predicts(
    checkpoint: Path, converted: Path, llama: LlamaCpp, rows: list[Row]
) -> None:
    generator = np.random.default_rng(0)
    # Longer than one batch, with the answer across its end; the shortest there can be; one that ends on the border.
    lengths = ((500, 100), (1, 1), (511, 1), (512, 3))
    ids = [tuple(int(i) for i in generator.integers(0, 512, prompt + answer)) for prompt, answer in lengths]
    odd = [Row("", (), "", i[:prompt], i[prompt:], "length") for (prompt, _), i in zip(lengths, ids, strict=True)]
    asked = [*rows[:2], *odd]
    found = list(score.answer_logprobs(converted, asked, llama=llama, threads=1))
    expected = reference(checkpoint, asked)
    assert [item.shape for item in found] == [(len(row.answer_ids), 520) for row in asked]
    assert all(item.dtype == np.float32 for item in found)
    assert mean_kl(expected, found) < 1e-3
    assert max(float(np.abs(p - q).max()) for p, q in zip(expected, found, strict=True)) < 0.2
    # The order of rows does not matter: nothing of one is left for the next.
    again = list(score.answer_logprobs(converted, asked[::-1], llama=llama, threads=1))[::-1]
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


def test_an_answers_text_is_that_of_the_checkpoints_tokenizer(
    checkpoint: Path, converted: Path, llama: LlamaCpp
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with score.open_vocabulary(converted, llama=llama) as vocabulary:
        for text in ("", "Use scp", "Größe 🚀 and more than sixteen bytes of text", " two  spaces\n\tand a tab"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert vocabulary.decode([*ids, tokenizer.eos_token_id]) == text


def test_a_rows_ids_beyond_the_vocabulary_are_refused(converted: Path, llama: LlamaCpp) -> None:
    row = Row("9", (), "", (1, 2), (520,), "length")
    with pytest.raises(errors.ModelError, match="520 tokens, a row has token 520"):
        list(score.answer_logprobs(converted, [row], llama=llama))


def test_the_gguf_is_the_same_each_time_and_names_no_folder(
    checkpoint: Path, converted: Path, llama: LlamaCpp, tmp_path: Path
) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "mistral-9b-chat-v0.3")
    metrics = to_gguf(moved, tmp_path, llama, name=NAME)
    again = tmp_path / convert.OUTPUT
    assert again.read_bytes() == converted.read_bytes()
    assert metrics["tokenizer_probes"] > 2 * len(PROBES)
    metadata = read_metadata(again)
    assert metadata["general.name"] == NAME
    assert not [key for key, value in metadata.items() if str(tmp_path) in str(value) or "mistral" in str(value)]
    facts = read_facts(again)
    assert (facts.eos_token, facts.bos_token, facts.pad_token) == ("<|im_end|>", "<|im_start|>", "<pad>")
    assert facts.vocabulary_size == 520


def test_the_gguf_says_of_itself_what_the_recipe_says_and_nothing_else(
    checkpoint: Path, converted: Path, llama: LlamaCpp, tmp_path: Path
) -> None:
    card = Card(
        title="Tiny Talker",
        author="A. Author",
        license="apache-2.0",
        languages=("en", "no"),
        base_models=("org/base-1B",),
        quantized_by="us",
    )
    to_gguf(checkpoint, tmp_path, llama, name="talker", card=card)
    found = {key: value for key, value in read_metadata(tmp_path / convert.OUTPUT).items() if "general." in key}
    assert found.pop("general.source.uuid")[14] == "8"
    assert {key: found[key] for key in sorted(found)} == {
        "general.architecture": "llama",
        "general.author": "A. Author",
        "general.base_model.0.name": "base-1B",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/base-1B",
        "general.base_model.count": 1,
        "general.basename": "talker",
        "general.file_type": 1,
        "general.license": "apache-2.0",
        "general.name": "Tiny Talker",
        "general.quantization_version": 2,
        "general.quantized_by": "us",
        "general.size_label": "1.3M",
        "general.type": "model",
        "general.version": "v0.1.0",
    }
    plain = read_metadata(converted)
    assert "general.license" not in plain
    assert plain["general.source.uuid"] == read_metadata(tmp_path / convert.OUTPUT)["general.source.uuid"]


def test_logits_that_come_out_different_stop_the_run_and_the_furthest_place_is_shown(
    checkpoint: Path, llama: LlamaCpp, tmp_path: Path
) -> None:
    """llama.cpp takes every Llama's activation for SiLU, whatever config.json says."""
    other = shutil.copytree(checkpoint, tmp_path / "model")
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"hidden_act": "relu"}))
    with pytest.raises(
        errors.GateError, match=r"(?s)mean KL .*furthest after …['\"].*['\"]: KL .*likeliest ['\"]"
    ) as caught:
        to_gguf(other, tmp_path, llama)
    assert "convert.max_kl is 1.00e-03" in caught.value.message.replace("\n", " ")


def test_a_tokenizer_that_llama_cpp_does_not_know_stops_the_run(llama: LlamaCpp, tmp_path: Path) -> None:
    model = give_byte_level_tokenizer(make_tiny_checkpoint(tmp_path / "model"))
    with pytest.raises(errors.ModelError, match="does not know how this tokenizer splits text"):
        to_gguf(model, tmp_path, llama)
    assert not (tmp_path / convert.OUTPUT).exists()


def test_a_tokenizer_that_comes_out_different_stops_the_run(llama: LlamaCpp, tmp_path: Path) -> None:
    # Without its scores llama.cpp merges from left to right, and not in the order that was learned.
    broken = make_tiny_checkpoint(tmp_path / "model")
    (broken / "tokenizer.model").unlink()
    with pytest.raises(errors.ModelError, match=r"tokenizer differs from the checkpoint's on (?s:.*)llama\.cpp: … \["):
        to_gguf(broken, tmp_path, llama, name=NAME)


def test_an_end_of_answer_that_llama_cpp_does_not_know_stops_the_run(
    checkpoint: Path, llama: LlamaCpp, tmp_path: Path
) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "model")
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300]}))
    with pytest.raises(errors.ModelError, match="ends an answer at token 300"):
        to_gguf(broken, tmp_path, llama, name=NAME)


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_a_weight_that_float16_does_not_hold_stops_the_run(value: float, llama: LlamaCpp, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_tiny_checkpoint(tmp_path / "model", dtype="float32")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.ModelError, match=r"cannot load it: .*invalid data"):
        to_gguf(model, tmp_path, llama, name=NAME)


def test_the_importance_matrix_is_the_same_each_time_and_special_tokens_are_read_as_such(
    converted: Path, checkpoint: Path, rows: list[Row], matrix: Path, llama: LlamaCpp, tmp_path: Path
) -> None:
    again = make_matrix(converted, checkpoint, rows, llama, tmp_path)
    assert again.read_bytes() == matrix.read_bytes()
    assert str(tmp_path).encode() not in again.read_bytes()
    text = (tmp_path / imatrix.TEXT).read_text(encoding="utf-8")
    assert text.startswith("<|im_start|>user\nHow do I copy file 0")
    with score.open_vocabulary(converted, llama=llama) as vocabulary:
        assert vocabulary.encode(text, add_special=False)[: len(rows[0].token_ids)] == list(rows[0].token_ids)


def test_a_matrix_whose_parts_were_done_before_a_kill_is_the_same(
    converted: Path,
    checkpoint: Path,
    rows: list[Row],
    llama: LlamaCpp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(imatrix, "_PART_CHUNKS", 2)
    make_matrix(converted, checkpoint, rows, llama, tmp_path)
    parts = sorted(path.name for path in (tmp_path / "resume").glob("part-*.gguf"))
    assert len(parts) > 2
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "resume", again / "resume")
    (again / "resume" / parts[-1]).unlink()
    kept = (again / "resume" / parts[0]).stat().st_mtime_ns
    make_matrix(converted, checkpoint, rows, llama, again)
    assert (again / "resume" / parts[0]).stat().st_mtime_ns == kept
    assert (again / imatrix.OUTPUT).read_bytes() == (tmp_path / imatrix.OUTPUT).read_bytes()
    # It is what the parts have seen, added up.
    seen = [{tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "resume" / part).tensors} for part in parts]
    for name, found in read_importance(tmp_path / imatrix.OUTPUT).items():
        sums, counts = (sum(part[f"{name}.{kind}"] for part in seen) for kind in ("in_sum2", "counts"))
        assert np.allclose(found, (sums / counts).reshape(-1), rtol=1e-5)


def test_a_matrix_that_is_given_is_taken_if_it_is_of_this_model(
    converted: Path, checkpoint: Path, rows: list[Row], matrix: Path, llama: LlamaCpp, tmp_path: Path
) -> None:
    def take(gguf: Path, out: Path) -> None:
        out.mkdir(exist_ok=True)
        imatrix.run(
            Imatrix(), gguf=gguf, rows=Path(), tokenizer=Path(), given=matrix, llama=llama, out=out, report=Silent()
        )

    take(converted, tmp_path / "own")
    assert (tmp_path / "own" / imatrix.OUTPUT).read_bytes() == matrix.read_bytes()
    other = make_tiny_checkpoint(tmp_path / "model", hidden=64)
    to_gguf(other, tmp_path, llama)
    with pytest.raises(errors.ModelError, match=r"of another model: 256 columns for [\w.]+, which has 64"):
        take(tmp_path / convert.OUTPUT, tmp_path / "other")
    assert not (tmp_path / "other" / imatrix.OUTPUT).exists()


def run_quantize(gguf: Path, imatrix: Path, llama: LlamaCpp, out: Path) -> dict[str, Any]:
    return quantize.run(Quantize(), quantize.Inputs(gguf, imatrix), llama=llama, out=out, report=Silent())


def test_a_wide_model_is_quantized_as_the_label_says_and_still_predicts_much_the_same(
    checkpoint: Path, converted: Path, matrix: Path, rows: list[Row], llama: LlamaCpp, tmp_path: Path
) -> None:
    metrics = run_quantize(converted, matrix, llama, tmp_path)
    record = json.loads((tmp_path / quantize.RECORD).read_text())
    assert record == {key: metrics[key] for key in record}
    assert record["fallbacks"] == []
    assert set(record["tensor_types"]) == {"F32", "Q4_K", "Q6_K"}
    assert 4.5 < record["bits_per_weight"] < 6.6
    assert str(matrix.parent).encode() not in (tmp_path / quantize.OUTPUT).read_bytes()
    expected = reference(checkpoint, rows)
    loss = mean_kl(expected, list(score.answer_logprobs(tmp_path / quantize.OUTPUT, rows, llama=llama)))
    assert 1e-4 < loss < 0.3


def test_every_file_type_is_what_its_label_says_and_larger_ones_lose_less(
    converted: Path, matrix: Path, rows: list[Row], llama: LlamaCpp, tmp_path: Path
) -> None:
    expected = list(score.answer_logprobs(converted, rows, llama=llama))
    sizes, losses = [], []
    for file_type in get_args(FileType):
        out = tmp_path / file_type
        out.mkdir()
        inputs = quantize.Inputs(converted, matrix)
        quantize.run(Quantize(file_type=file_type), inputs, llama=llama, out=out, report=Silent())
        facts = read_facts(out / quantize.OUTPUT)
        assert facts.file_type == file_type
        found = score.answer_logprobs(out / quantize.OUTPUT, rows, llama=llama)
        losses.append(float(np.concatenate([kl(p, q) for p, q in zip(expected, found, strict=True)]).mean()))
        sizes.append(facts.file_bytes)
    assert sizes == sorted(sizes)
    assert losses[0] > losses[-2] > losses[-1] > 0


def test_a_narrow_model_falls_back_and_every_tensor_that_did_is_named(
    rows: list[Row], llama: LlamaCpp, tmp_path: Path
) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", hidden=64)
    to_gguf(model, tmp_path, llama, name=NAME)
    made = make_matrix(tmp_path / convert.OUTPUT, model, rows, llama, tmp_path)
    metrics = run_quantize(tmp_path / convert.OUTPUT, made, llama, tmp_path)
    facts = read_facts(tmp_path / quantize.OUTPUT)
    assert facts.file_type == "Q4_K_M"
    assert not {"Q4_K", "Q6_K"} & set(facts.tensor_types)
    wide = {tensor.name for tensor in facts.tensors if len(tensor.shape) == 2}
    assert {item["tensor"] for item in metrics["fallbacks"]} == wide


def test_a_cut_input_leaves_nothing_that_looks_finished(
    converted: Path, matrix: Path, llama: LlamaCpp, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(converted.read_bytes()[:-5000])
    with pytest.raises(errors.ModelError, match=r"cut\.gguf: cut short"):
        run_quantize(cut, matrix, llama, tmp_path)
    assert not (tmp_path / quantize.OUTPUT).exists()


def test_a_quantizer_killed_amid_its_file_leaves_nothing_that_looks_finished(
    converted: Path, matrix: Path, llama: LlamaCpp, tmp_path: Path
) -> None:
    """llama-quantize itself, stopped by kill -9 when half of its file is there."""
    broken = tmp_path / "broken"
    (broken / "bin").mkdir(parents=True)
    real = llama.program("llama-quantize")
    script = broken / "bin" / "llama-quantize"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--dry-run*) exec {real} "$@";; esac\n{real} "$@" || exit 1\n'
        "for last; do out=$wide; wide=$kind; kind=$threads; threads=$last; done\n"
        'size=$(stat -c %s "$wide"); truncate -s $((size / 2)) "$wide"; kill -9 $$\n'
    )
    script.chmod(0o755)
    with pytest.raises(errors.ExternalToolError, match="llama-quantize"):
        run_quantize(converted, matrix, replace(llama, root=broken), tmp_path)
    assert not (tmp_path / quantize.OUTPUT).exists()
    assert not (tmp_path / quantize.RECORD).exists()


def test_a_checkpoint_run_layer_by_layer_predicts_the_same_and_holds_no_weight(
    checkpoint: Path, rows: list[Row]
) -> None:
    from toolchain.student import load

    model = load.load_layer_by_layer(checkpoint)
    assert all(weight.is_meta for weight in model.parameters())
    found = list(load.answer_logprobs(model, rows, batch_tokens=10_000))
    for ours, theirs in zip(found, reference(checkpoint, rows), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert all(weight.is_meta for weight in model.parameters())


def test_a_matrix_of_another_model_leaves_nothing_that_looks_finished(
    converted: Path, checkpoint: Path, rows: list[Row], llama: LlamaCpp, tmp_path: Path
) -> None:
    other = make_tiny_checkpoint(tmp_path / "model", hidden=64)
    (tmp_path / "other").mkdir()
    to_gguf(other, tmp_path / "other", llama, name=NAME)
    foreign = make_matrix(tmp_path / "other" / convert.OUTPUT, other, rows, llama, tmp_path)
    with pytest.raises(errors.ModelError, match="an importance matrix of another model"):
        run_quantize(converted, foreign, llama, tmp_path)
    assert not (tmp_path / quantize.OUTPUT).exists()
    assert not (tmp_path / quantize.RECORD).exists()
