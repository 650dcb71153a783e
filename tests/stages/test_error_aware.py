"""Types by what the model loses, on a tiny checkpoint by the pinned llama.cpp."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")

import numpy as np
from gguf import GGUFReader

from tests.stages.gguf_files import to_gguf, to_matrix
from tests.tiny import make_tiny_checkpoint
from toolchain import errors
from toolchain.data.rows import Row, write_rows
from toolchain.evaluate.divergence import kl
from toolchain.gguf import convert, quantize, score, search
from toolchain.gguf.ggml import Quantizer, read_importance
from toolchain.gguf.header import read_facts
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.gguf.overlay import Divergence, open_overlay
from toolchain.journal import Journal
from toolchain.recipe import Quantize
from toolchain.reporter import Silent
from toolchain.teacher.gguf_decode import greedy_texts

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]

ASKED = Quantize(allocation="error-aware", search_tokens=128, search_trials=6)


@pytest.fixture(scope="module")
def made(llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> quantize.Inputs:
    """A 16-bit GGUF whose rows are 256 and 512 wide, rows to train on and held out, and the importance matrix."""
    root = tmp_path_factory.mktemp("error-aware")
    model = make_tiny_checkpoint(root / "model", hidden=256, layers=3, vocabulary=520)
    to_gguf(model, root, llama)
    random = np.random.default_rng(0)
    rows = [
        Row(str(at), (), "", tuple(map(int, ids[:12])), tuple(map(int, ids[12:])), "length")
        for at, ids in enumerate(random.integers(4, 500, (40, 32)))
    ]
    write_rows(root / "train.jsonl", rows[:24])
    # What the 16-bit model itself would answer, so that a score of it is known.
    answers = greedy_texts(root / convert.OUTPUT, rows[24:], llama=llama, report=Silent())
    held_out = [replace(row, answer=answer) for row, answer in zip(rows[24:], answers, strict=True)]
    write_rows(root / "held_out.jsonl", held_out)
    matrix = to_matrix(root / convert.OUTPUT, root / "train.jsonl", model, llama, root)
    return quantize.Inputs(root / convert.OUTPUT, matrix, root / "train.jsonl", root / "held_out.jsonl")


def run(settings: Quantize, inputs: quantize.Inputs, llama: LlamaCpp, out: Path) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return quantize.run(settings, inputs, llama=llama, out=out, report=Silent())


@pytest.fixture(scope="module")
def done(made: quantize.Inputs, llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done")
    run(ASKED, made, llama, out)
    return out


def rows_of(path: Path) -> list[Row]:
    from toolchain.data.rows import read_rows

    return read_rows(path)


def test_a_tensor_is_quantized_to_the_bytes_that_llama_quantize_writes(
    made: quantize.Inputs, llama: LlamaCpp, tmp_path: Path
) -> None:
    run(Quantize(), made, llama, tmp_path)
    source = {tensor.name: tensor for tensor in GGUFReader(made.gguf).tensors}
    importance, quantizer, kinds = read_importance(made.imatrix), Quantizer(llama), set()
    for tensor in GGUFReader(tmp_path / quantize.OUTPUT).tensors:
        kind = tensor.tensor_type.name
        if kind == "F32":
            continue
        kinds.add(kind)
        rows = np.ascontiguousarray(source[tensor.name].data, np.float32)
        found = quantizer.quantize(kind, rows, importance.get(tensor.name))
        assert np.array_equal(found, tensor.data), tensor.name
    assert kinds == {"Q4_K", "Q6_K"}


def test_exchanged_weights_are_computed_with_and_the_file_keeps_its_own(
    made: quantize.Inputs, llama: LlamaCpp, tmp_path: Path
) -> None:
    """KL of weights exchanged in memory against that of a GGUF with them in it."""
    before, rows = made.gguf.read_bytes(), rows_of(made.train or Path())[:6]
    name = "blk.1.ffn_down.weight"
    with open_overlay(made.gguf, llama=llama) as overlay:
        divergence = Divergence(overlay, rows, llama=llama)
        assert abs(divergence.measure().mean()) < 1e-6
        original = overlay.original(name)
        overlay.write(name, original * np.float32(1.1))
        changed = divergence.measure()
        overlay.restore(name)
        assert abs(divergence.measure().mean()) < 1e-6
        assert np.array_equal(overlay.original(name), original)
        divergence.close()
    assert made.gguf.read_bytes() == before
    other = tmp_path / "other.gguf"
    shutil.copyfile(made.gguf, other)
    tensor = next(tensor for tensor in GGUFReader(other, "r+").tensors if tensor.name == name)
    tensor.data[:] = (original * np.float32(1.1)).astype(np.float16)
    tensor.data.flush()
    total = tokens = 0.0
    pairs = zip(
        score.answer_logprobs(made.gguf, rows, llama=llama),
        score.answer_logprobs(other, rows, llama=llama),
        strict=True,
    )
    for p, q in pairs:
        total += float(kl(p, q).sum())
        tokens += len(p)
    assert changed.shape == (int(tokens),)
    assert changed.mean() == pytest.approx(total / tokens, rel=0.02)


def test_the_search_loses_less_than_stock_in_no_more_bytes(done: Path, made: quantize.Inputs) -> None:
    record = json.loads((done / quantize.RECORD).read_text())
    allocation = record["allocation"]
    assert allocation["taken"]
    assert allocation["held_out"]["change"]["high"] < 0
    forms = allocation["held_out"]["forms"]
    assert list(forms) == ["16-bit", "stock, no matrix", "stock", "error-aware"]
    assert forms["error-aware"]["kl"] < forms["stock"]["kl"]
    assert forms["16-bit"]["kl"] == 0
    assert forms["16-bit"]["same_top"] == 1
    assert forms["16-bit"]["answer_f1"] == 1
    assert 0 <= forms["stock, no matrix"]["answer_f1"] < 1
    speeds = json.loads((done / quantize.SPEED).read_text())
    for speed in (speeds["prefill"], speeds["decode"]):
        assert list(speed) == ["16-bit", "stock", "error-aware"]
        assert all(len(found["samples"]) == 5 and min(found["samples"]) > 0 for found in speed.values())
        assert speed["stock"]["ratio"] == 1
    assert forms["error-aware"]["kl"] < forms["error-aware"]["kl_p99"]
    assert forms["stock, no matrix"]["file_bytes"] < forms["stock"]["file_bytes"]  # the matrix's name is in the other
    assert record["file_bytes"] == (done / quantize.OUTPUT).stat().st_size <= forms["stock"]["file_bytes"]
    assert sorted(path.name for path in done.iterdir() if path.is_file()) == sorted(
        [quantize.OUTPUT, quantize.RECORD, quantize.PLAN, quantize.SPEED]
    )
    facts = read_facts(done / quantize.OUTPUT)
    assert {tensor.name: tensor.type for tensor in facts.tensors if tensor.type != "F32"} == allocation["plan_types"]
    # Sensitive is what the search says, not what stock takes it to be.
    assert all(kl >= 0 for kl in allocation["search"]["sensitivity"].values())


def test_a_plan_can_be_taken_as_it_is_and_gives_the_same_bytes(
    done: Path, made: quantize.Inputs, llama: LlamaCpp, tmp_path: Path
) -> None:
    inputs = quantize.Inputs(made.gguf, made.imatrix, plan=done / quantize.PLAN)
    metrics = run(Quantize(), inputs, llama, tmp_path)
    assert metrics["allocation"] == {"kind": "plan"}
    assert (tmp_path / quantize.OUTPUT).read_bytes() == (done / quantize.OUTPUT).read_bytes()


def test_a_search_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    done: Path, made: quantize.Inputs, llama: LlamaCpp, tmp_path: Path
) -> None:
    lines = (done / "resume" / "search.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "resume").mkdir()
    half = len(lines) // 2
    (tmp_path / "resume" / "search.jsonl").write_bytes(b"".join(lines[:half]) + lines[half][:9])
    run(ASKED, made, llama, tmp_path)
    assert (tmp_path / "resume" / "search.jsonl").read_bytes() == b"".join(lines)
    for name in (quantize.OUTPUT, quantize.RECORD, quantize.PLAN):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()


def test_a_smaller_target_is_kept_to(made: quantize.Inputs, llama: LlamaCpp, tmp_path: Path) -> None:
    metrics = run(ASKED.model_copy(update={"target_bits": 4.4, "search_trials": 0}), made, llama, tmp_path)
    assert 4.2 < metrics["bits_per_weight"] <= 4.4
    assert metrics["allocation"]["taken"]


def test_stock_is_kept_where_the_gain_is_not_beyond_doubt(
    made: quantize.Inputs, llama: LlamaCpp, tmp_path: Path
) -> None:
    """With stock's own types to choose from, there is nothing to gain."""
    metrics = run(ASKED.model_copy(update={"types": ("Q8_0",), "search_trials": 0}), made, llama, tmp_path / "out")
    assert not metrics["allocation"]["taken"]
    assert "stock kept" in metrics["summary"]
    run(Quantize(), made, llama, tmp_path / "stock")
    assert (tmp_path / "out" / quantize.OUTPUT).read_bytes() == (tmp_path / "stock" / quantize.OUTPUT).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file()) == sorted(
        [quantize.OUTPUT, quantize.RECORD, quantize.PLAN, quantize.SPEED]
    )


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"target_bytes": 100}, errors.RecipeError, r"quantize\.target_bytes is 100: .* at least"),
        ({"target_bits": 2.1}, errors.RecipeError, r"quantize\.target_bits is 2\.1: .* at least"),
    ],
)
def test_a_target_that_cannot_be_met_is_refused(
    made: quantize.Inputs,
    llama: LlamaCpp,
    tmp_path: Path,
    settings: dict[str, Any],
    kind: type[errors.ToolchainError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        run(ASKED.model_copy(update=settings), made, llama, tmp_path)
    assert not (tmp_path / quantize.OUTPUT).exists()


def test_a_plan_that_is_worse_is_given_up_before_all_rows_are_scored(
    made: quantize.Inputs, llama: LlamaCpp, tmp_path: Path
) -> None:
    """And one that is better is scored on all of them, to the KL that they have at once."""
    rows = rows_of(made.train or Path()) * 4
    importance, names = read_importance(made.imatrix), [f"blk.{at}.ffn_down.weight" for at in range(3)]
    fine, coarse = dict.fromkeys(names, "Q6_K"), dict.fromkeys(names, "Q3_K")
    with open_overlay(made.gguf, llama=llama) as overlay, Journal(tmp_path / "a" / "search.jsonl") as journal:
        divergence = Divergence(overlay, rows, llama=llama)
        looks = -(-divergence.batches // search._LOOK)
        assert looks > 2
        trial = search._Trial(search._Weights(overlay, Quantizer(llama), importance), divergence, journal)
        kl = trial.kl(fine)
        assert kl == pytest.approx(divergence.measure().mean())
        assert not trial.beats(coarse, fine)
        lines = (tmp_path / "a" / "search.jsonl").read_text().splitlines()
        assert looks < len(lines) < 2 * looks
        assert trial.beats(fine, coarse)
        assert trial.kl(coarse) > kl
        assert len((tmp_path / "a" / "search.jsonl").read_text().splitlines()) == 2 * looks
        assert trial.measured == 2
        assert not trial.beats(fine, fine)
        divergence.close()


def test_rows_for_tensors_and_for_plans_are_others_and_of_the_sizes_asked_for() -> None:
    rows = [Row(str(at), (), "", (1,), (2,) * 10, "length") for at in range(2000)]
    first, second = search.draw(rows, 4096)
    assert sum(len(row.answer_ids) for row in first) == pytest.approx(1024, abs=20)
    assert sum(len(row.answer_ids) for row in second) == pytest.approx(4096, abs=20)
    ids = [row.id for row in [*first, *second]]
    assert len(set(ids)) == len(ids)
    assert max(map(int, ids)) > 1900
    assert (first, second) == search.draw(rows, 4096)
    assert [len(part) for part in search.draw(rows[:2], 4096)] == [1, 1]
    first, second = search.draw(rows, 128)
    assert abs(len(first) - len(second)) <= 1
    with pytest.raises(errors.DataError, match="1 training rows"):
        search.draw(rows[:1], 4096)


def test_widths_that_no_block_of_256_divides_get_types_of_32() -> None:
    kinds = Quantize().types
    assert search.usable_kinds(576, kinds, "Q5_0") == ("IQ4_NL", "Q5_0", "Q8_0")
    assert set(search.usable_kinds(512, [*kinds, "Q5_1"], "Q4_K")) == set(kinds) - {"Q5_0"}
    assert search.usable_kinds(40, kinds, "F16") == ("F16",)


def test_the_plan_names_each_tensor_alone() -> None:
    lines = search.render({"blk.1.attn_q.weight": "Q5_0", "blk.11.attn_q.weight": "Q8_0"}).splitlines()
    patterns = [line.partition("=")[0] for line in lines]
    assert [line.partition("=")[2] for line in lines] == ["q5_0", "q8_0"]
    assert [bool(re.search(pattern, "blk.1.attn_q.weight")) for pattern in patterns] == [True, False]
