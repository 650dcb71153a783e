"""Teacher + rows → logit cache, on tiny real models: what is stored is what the model says."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.lines import Lines
from tests.stages.gguf_files import to_gguf
from tests.tiny import make_tiny_checkpoint
from toolchain.data.rows import Message, Row, read_rows, write_rows
from toolchain.errors import ArtifactError, HostError, ModelError, RecipeError
from toolchain.recipe import Capture, read_recipe
from toolchain.reporter import Silent

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.stages

QUESTIONS = [f"What does the command {name} do?" for name in ("ls", "cp", "mv", "scp", "tail", "ss", "git", "find")]
EXACT = Capture(top_k=16, min_probability=0.0, value_bits=12, batch_tokens=128)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, rows that it answers and a verdict that the student has its tokens."""
    from toolchain.student import load

    root = tmp_path_factory.mktemp("made")
    made = {"root": root, "teacher": make_tiny_checkpoint(root / "teacher"), "rows": root / "train.jsonl"}
    tokenizer = load.load_tokenizer(made["teacher"])
    rows = []
    for number, question in enumerate(QUESTIONS):
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        answer = tokenizer("Use it with the name of a file. " * (1 + number % 3))["input_ids"]
        rows.append(Row(f"row-{number}", (Message("user", question),), "", tuple(prompt), tuple(answer), "length"))
    write_rows(made["rows"], [*rows, rows[0]])
    made["vocabulary"] = _vocabulary(root / "vocabulary.json", made["teacher"])
    return made


def _vocabulary(path: Path, teacher: Path, *, ids: int = 512, **change: Any) -> Path:
    """What the `vocabulary` stage says of a student with the teacher's tokenizer, up to `change`."""
    from toolchain.student import load, vocabulary

    digest = vocabulary.tokenizer_digest(load.load_tokenizer(teacher), ids=ids)
    found = asdict(vocabulary.verdict(teacher, teacher))
    path.write_text(json.dumps({**found, "ids": ids, "tokenizer": digest, **change}))
    return path


def _capture(made: dict[str, Path], out: Path, settings: Capture = EXACT, **change: Any) -> dict[str, Any]:
    from toolchain.teacher import capture

    out.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "temperatures": (1.0, 2.0),
        "teacher": made["teacher"],
        "gguf": None,
        "load_in_4bit": False,
        "llama": None,
        "vocabulary": made["vocabulary"],
        "rows": made["rows"],
        "report": Silent(),
    }
    return capture.run(settings, out=out, **{**options, **change})


def _logits(made: dict[str, Path], row: Row) -> Any:
    from toolchain.student import load

    model, _ = load.load_model(made["teacher"], dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        return model(torch.tensor([row.token_ids])).logits[0, len(row.prompt_ids) - 1 : -1].double()


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_the_cache_holds_the_teachers_probabilities(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.teacher.logit_cache import Reader

    figures = _capture(made, tmp_path)
    assert figures["rows"] == len(QUESTIONS), "two rows with the same tokens are one"
    reader = Reader(tmp_path)
    for row in read_rows(made["rows"]):
        logits = _logits(made, row)
        for temperature in (1.0, 2.0):
            ids, logprobs = reader.at_temperature(row, temperature)
            true = (logits / temperature).softmax(-1).gather(-1, torch.from_numpy(ids)).numpy()
            filled = np.isfinite(logprobs)
            found = np.where(filled, np.exp(logprobs.astype(np.float64)), 0)
            assert np.abs(found - np.where(filled, true, 0)).max() < 1e-3
            tail = 1 - np.where(filled, true, 0).sum(-1)
            assert 1 - found.sum(-1) == pytest.approx(tail, rel=0.005, abs=2e-6)


def test_a_position_keeps_what_the_settings_say(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.teacher.logit_cache import Reader

    cases = [
        Capture(top_k=8, top_p=0.5, min_probability=0.0),
        Capture(top_k=100, top_p=1.0, min_probability=0.02),
        Capture(top_k=3, top_p=1.0, min_probability=0.0),
        Capture(top_k=5, top_p=1.0, min_probability=0.9),
    ]
    row = read_rows(made["rows"])[2]
    flattest = (_logits(made, row) / 2).softmax(-1).sort(descending=True)
    for number, settings in enumerate(cases):
        folder = tmp_path / str(number)
        _capture(made, folder, settings)
        found = Reader(folder).read(row)
        p = flattest.values[:, : settings.top_k]
        wanted = ((p.cumsum(-1) - p < settings.top_p) & (p >= settings.min_probability)).sum(-1).clamp(min=1)
        assert found.counts.tolist() == wanted.tolist()
        kept = [set(part.tolist()) for part in np.split(found.ids, np.cumsum(found.counts)[:-1])]
        ranked = [set(flattest.indices[at, :count].tolist()) for at, count in enumerate(wanted)]
        assert kept == ranked


def test_a_sample_is_unbiased_and_the_same_in_every_batch(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.teacher.logit_cache import Reader

    settings = Capture(selection="sample", samples=2000, batch_tokens=128)
    _capture(made, tmp_path / "one", settings, temperatures=(2.0,))
    _capture(made, tmp_path / "two", settings.model_copy(update={"batch_tokens": 16}), temperatures=(2.0,))
    row = read_rows(made["rows"])[5]
    ids, logprobs = Reader(tmp_path / "one").at_temperature(row, 2.0)
    again, _ = Reader(tmp_path / "two").at_temperature(row, 2.0)
    # Sums of another batch round otherwise, and a draw may fall on the neighbour.
    assert np.mean([len(set(a) & set(b)) / len(set(a)) for a, b in zip(ids, again, strict=True)]) > 0.99
    p = (_logits(made, row) / 2).softmax(-1).numpy()
    share = np.zeros_like(p)
    np.put_along_axis(share, ids, np.where(np.isfinite(logprobs), np.exp(logprobs), 0), -1)
    # Each share is binomial: its standard deviation is √(p(1 − p)/n).
    deviations = (share - p)[p > 0.01] / np.sqrt(p * (1 - p) / 2000)[p > 0.01]
    assert abs(deviations.mean()) < 4 / len(deviations) ** 0.5
    assert 0.8 < deviations.std() < 1.2


def test_a_padded_vocabulary_is_renormalised_over_the_common_ids(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.teacher.logit_cache import Reader

    verdict = _vocabulary(tmp_path / "vocabulary.json", made["teacher"], verdict="padded", ids=500)
    settings = Capture(top_k=500, top_p=1.0, min_probability=0.0, value_bits=12)
    _capture(made, tmp_path / "out", settings, vocabulary=verdict)
    row = read_rows(made["rows"])[0]
    ids, logprobs = Reader(tmp_path / "out").at_temperature(row, 1.0)
    assert ids.shape == (len(row.answer_ids), 500)
    expected = _logits(made, row)[:, :500].softmax(-1).gather(-1, torch.from_numpy(ids)).numpy()
    assert np.abs(np.exp(logprobs) - expected).max() < 1e-3


@pytest.mark.parametrize("verdict", ["different", "unknown"])
def test_another_vocabulary_is_refused_with_the_methods_that_remain(
    made: dict[str, Path], tmp_path: Path, verdict: str
) -> None:
    path = _vocabulary(tmp_path / "v.json", made["teacher"], verdict=verdict, reasons=["3 of 512 ids differ"])
    with pytest.raises(ModelError, match=f"vocabulary is {verdict}; 3 of 512 ids differ") as refused:
        _capture(made, tmp_path / "out", vocabulary=path)
    assert "'answers'" in str(refused.value.hint)
    assert "'uld'" in str(refused.value.hint)


def test_a_verdict_on_another_teacher_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    path = _vocabulary(tmp_path / "v.json", made["teacher"], tokenizer="0" * 64)
    with pytest.raises(ArtifactError, match="made for another tokenizer than that of"):
        _capture(made, tmp_path / "out", vocabulary=path)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match=r"v\.json"):
        _capture(made, tmp_path / "out", vocabulary=path)


def test_a_token_outside_the_common_ids_names_the_row(made: dict[str, Path], tmp_path: Path) -> None:
    path = _vocabulary(tmp_path / "v.json", made["teacher"], ids=400)
    with pytest.raises(ModelError, match=r"row row-\d has token \d+; teacher and student share 400 ids"):
        _capture(made, tmp_path / "out", vocabulary=path)


def test_no_rows_are_an_error(made: dict[str, Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    with pytest.raises(ArtifactError, match="no rows"):
        _capture(made, tmp_path / "out", rows=rows)


def test_a_capture_that_was_killed_goes_on_and_gives_the_same_files(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.teacher import capture

    monkeypatch.setattr(capture, "SHARD_TOKENS", 30)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _capture(made, whole)
    assert len(list(whole.glob("shard-*.safetensors"))) >= 3
    shutil.copytree(whole / "resume", cut / "resume")
    (cut / "resume" / "shard-00001.safetensors").write_bytes(b"half")
    (cut / "resume" / "shard-00002.json").unlink()
    metrics = _capture(made, cut)
    assert 0 < metrics["rows_resumed"] < len(QUESTIONS)
    assert _files(cut) == _files(whole)
    again = _capture(made, cut)
    assert again["rows_resumed"] == len(QUESTIONS)
    assert again["engine"] == metrics["engine"], "said even where nothing was left to run"


_KILLED = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from toolchain.recipe import Capture
from toolchain.reporter import Silent
from toolchain.teacher import capture
capture.SHARD_TOKENS = 30
teacher, vocabulary, rows, out, settings = sys.argv[1:]
class Slow(Silent):
    def start(self, *_, **__):
        return self
    def advance(self, amount=1.0):
        time.sleep(0.3)
capture.run(Capture.model_validate_json(settings), temperatures=(1.0, 2.0), teacher=Path(teacher), gguf=None,
            load_in_4bit=False, llama=None, vocabulary=Path(vocabulary), rows=Path(rows), out=Path(out), report=Slow())
"""


def test_a_capture_killed_by_sigkill_and_started_again_gives_the_same_files(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.teacher import capture

    monkeypatch.setattr(capture, "SHARD_TOKENS", 30)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _capture(made, whole)
    cut.mkdir()
    paths = [str(made[name]) for name in ("teacher", "vocabulary", "rows")]
    argv = [sys.executable, "-c", _KILLED, *paths, str(cut), EXACT.model_dump_json()]
    child = subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"})
    limit = time.monotonic() + 120
    while not (cut / "resume" / "shard-00000.json").exists():
        assert child.poll() is None, "the child ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (cut / "index.json").exists()
    metrics = _capture(made, cut)
    assert 0 < metrics["rows_resumed"] < len(QUESTIONS)
    assert _files(cut) == _files(whole)


def test_logits_that_are_not_finite_name_the_row(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "teacher"
    shutil.copytree(made["teacher"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"logits for row row-\d are not finite"):
        _capture(made, tmp_path / "out", teacher=folder)


def test_a_single_bad_position_names_its_own_row(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.teacher import capture
    from toolchain.teacher.logit_cache import Source

    rows = read_rows(made["rows"])[:3]
    source = Source("a", "b", "c", 512, (1.0,), "top", 16, 1.0, 0.0, 6, 1)
    logits = torch.randn(sum(len(row.answer_ids) for row in rows), 512)
    logits[len(rows[0].answer_ids) + len(rows[1].answer_ids), 7] = float("inf")
    with pytest.raises(ModelError, match=r"logits for row row-2 are not finite"):
        capture.keep(rows, torch.split(logits, 5), source)


def test_a_batch_that_does_not_fit_is_halved_and_said_once(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.teacher import capture

    _capture(made, tmp_path / "whole", EXACT.model_copy(update={"batch_tokens": 16}))
    one_pass = capture._one_pass

    def fits_one_row(model: Any, head: Any, batch: Any, source: Any) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return one_pass(model, head, batch, source)

    monkeypatch.setattr(capture, "_one_pass", fits_one_row)
    lines = Lines()
    _capture(made, tmp_path / "split", EXACT.model_copy(update={"batch_tokens": 4096}), report=lines)
    assert _files(tmp_path / "split") == _files(tmp_path / "whole")
    assert len(lines.lines) == 1
    assert "capture.batch_tokens" in lines.lines[0]

    def fits_nothing(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(capture, "_one_pass", fits_nothing)
    with pytest.raises(HostError, match=r"row row-\d: its \d+ tokens alone do not fit") as refused:
        _capture(made, tmp_path / "none", report=lines)
    assert "data.max_length" in str(refused.value.hint)


def test_another_revision_of_the_teacher_is_captured_anew(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.teacher.capture import weights_digest
    from toolchain.teacher.logit_cache import Reader

    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    _capture(made, tmp_path / "out")
    metrics = _capture(made, tmp_path / "out", teacher=other)
    assert metrics["rows_resumed"] == 0
    reader = Reader(tmp_path / "out")
    reader.expect(teacher=weights_digest(other))
    with pytest.raises(ArtifactError, match="captured with teacher sha256"):
        reader.expect(teacher=weights_digest(made["teacher"]))


def test_the_temperatures_and_the_divergence_of_a_sample_are_checked_in_the_recipe(tmp_path: Path) -> None:
    for name in ("teacher", "t.jsonl", "h.jsonl"):
        (tmp_path / name).touch()
    recipe = tmp_path / "recipe.toml"
    head = 'name = "x"\n[teacher]\nmodel = "teacher"\n[data]\ntrain = "t.jsonl"\nheld_out = "h.jsonl"\n'
    sample = '[capture]\nselection = "sample"\n'
    recipe.write_text(head + sample)
    assert read_recipe(recipe).capture.samples == 50
    recipe.write_text(head + sample + '[distill]\ndivergence = "reverse_kl"\n')
    with pytest.raises(RecipeError, match=r"'sample' is right on average for .* 'forward_kl' alone, not .*reverse_kl"):
        read_recipe(recipe)
    recipe.write_text(head + sample + "temperatures = [1.0, 2.0]\n")
    with pytest.raises(RecipeError, match="draws at one temperature"):
        read_recipe(recipe)


def test_the_gradient_of_sampled_forward_kl_is_right_on_average(made: dict[str, Path]) -> None:
    """Over many draws, the loss's gradient tends to softmax(z / T) − p, tail and all."""
    from toolchain.student.losses import Objective, Teacher, distillation_loss
    from toolchain.teacher import capture
    from toolchain.teacher.logit_cache import Source, log_values

    source = Source("a", "b", "c", 64, (1.0,), "sample", 1, 1.0, 0.0, 6, 8)
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 64, generator=generator) * 2
    rounds = 4000
    draws = torch.rand(rounds, 8, generator=generator, dtype=torch.float64)
    found = capture.sampled(teacher.expand(rounds, 64), draws, source)
    filled = np.arange(found.counts.max()) < found.counts[:, None]
    ids, logprobs = np.zeros(filled.shape, np.int64), np.full(filled.shape, -np.inf)
    ids[filled], logprobs[filled] = found.ids, log_values(found.values, source) - np.log(8)
    scaled = student.expand(rounds, 64).clone().requires_grad_()
    objective = Objective(1.0, 0.0, 1.0, "forward_kl", 0.5, 0.1)
    said = Teacher(torch.from_numpy(ids), torch.from_numpy(logprobs).float())
    labels = torch.zeros(rounds, dtype=torch.long)
    loss = distillation_loss(scaled, torch.nn.Identity(), labels, said, objective=objective, tokens=1.0)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert scaled.grad is not None
    p, exact = teacher.softmax(-1), student.softmax(-1) - teacher.softmax(-1)
    error = (p * (1 - p) / 8 / rounds).sqrt()
    assert bool(((scaled.grad.mean(0) - exact).abs() < 5 * error + 1e-6).all())


@pytest.mark.llama_cpp
def test_a_gguf_teacher_is_captured_through_llama_cpp(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.gguf import llama_cpp
    from toolchain.pipeline import host_cmake
    from toolchain.teacher.logit_cache import Reader

    llama = llama_cpp.find(host_cmake())
    (tmp_path / "convert").mkdir()
    to_gguf(made["teacher"], tmp_path / "convert", llama)
    gguf = tmp_path / "convert" / "model-f16.gguf"
    bare = tmp_path / "bare"
    shutil.copytree(made["teacher"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    figures = _capture(made, tmp_path / "out", teacher=bare, gguf=gguf, llama=llama)
    assert figures["engine"] == "llama.cpp"
    _capture(made, tmp_path / "torch")
    reader, other = Reader(tmp_path / "out"), Reader(tmp_path / "torch")
    reader.expect(teacher=hashlib.sha256(gguf.read_bytes()).hexdigest())
    for row in read_rows(made["rows"]):
        p = [np.zeros((len(row.answer_ids), 512)) for _ in range(2)]
        for dense, cache in zip(p, (reader, other), strict=True):
            ids, logprobs = cache.at_temperature(row, 1.0)
            np.put_along_axis(dense, ids, np.exp(logprobs), -1)
        assert np.abs(p[0] - p[1]).sum(-1).mean() < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_stores_what_a_processor_does_up_to_bfloat16(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.teacher.logit_cache import Reader

    figures = _capture(made, tmp_path / "out")
    assert figures["device"] == "cuda"
    row = read_rows(made["rows"])[1]
    ids, logprobs = Reader(tmp_path / "out").at_temperature(row, 1.0)
    expected = _logits(made, row).log_softmax(-1).gather(-1, torch.from_numpy(ids)).numpy()
    likely = logprobs > -3
    assert np.abs(logprobs - expected)[likely].max() < 0.2
