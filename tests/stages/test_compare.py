"""`compare` on tiny real models: what it writes, what it asks only once, and what it says of a student that forgot."""

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

from tests.tiny import make_tiny_checkpoint
from toolchain.data.rows import Message, Row, write_rows
from toolchain.errors import DataError, ModelError
from toolchain.journal import Journal
from toolchain.recipe import Compare, Data, Generate
from toolchain.reporter import Silent

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.stages

NAMES = ("ls", "cp", "mv", "scp", "tail", "ss", "git", "find", "range")
TOKENS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two students of one shape, a teacher, other questions, and held-out rows that the second student answered."""
    from toolchain.evaluate import answering
    from toolchain.student import load
    from toolchain.teacher import generate

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("compare")
    made = {name: make_tiny_checkpoint(root / name, seed=seed) for seed, name in enumerate(("student", "merged"))}
    made["teacher"] = make_tiny_checkpoint(root / "teacher", layers=3, seed=2)
    tokenizer = load.load_tokenizer(made["merged"])
    questions = []
    for name in NAMES:
        messages = (Message("user", f"What does the command {name} do?"),)
        ids = generate.render(tokenizer, messages, where=name)
        questions.append(answering.Question(name, messages, ids, TOKENS, answering.Answer((), "length", "")))
    with Journal(root / "resume" / "teacher.jsonl") as journal:
        said = answering.ask(
            "as the teacher",
            made["merged"],
            {"all": questions},
            score=(),
            time_alone=questions[:1],
            decoding=Generate(),
            batch_size=4,
            journal=journal,
            report=Silent(),
        ).answers["all"]
    rows = [
        Row(asked.id, asked.messages, answer.text, asked.ids, answer.ids, answer.finish)
        for asked, answer in zip(questions, said, strict=True)
    ]
    made["held_out"] = root / "held_out.jsonl"
    write_rows(made["held_out"], rows)
    made["out_of_domain"] = root / "general.jsonl"
    other = [{"id": f"q{at}", "question": f"Is {at} a digit?", "answer": f"{at} is a digit."} for at in range(6)]
    made["out_of_domain"].write_text("".join(json.dumps(row) + "\n" for row in other))
    return made


def _compare(made: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    from toolchain.evaluate import compare

    paths = ("held_out", "teacher", "student", "merged", "embedding_model", "out_of_domain")
    given = {name: changes.pop(name, made.get(name)) for name in paths}
    max_length = changes.pop("max_length", 256)
    out.mkdir(exist_ok=True)
    return compare.run(
        Compare(**{"batch_size": 4, "resamples": 200, **changes}),
        Data(train=made["held_out"], held_out=made["held_out"], max_length=max_length),
        Generate(max_new_tokens=TOKENS),
        seed=0,
        out=out,
        report=Silent(),
        **given,
    )


def _read(out: Path) -> Any:
    return json.loads((out / "compare.json").read_text())


@pytest.fixture(scope="module")
def compared(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("compared")
    _compare(made, out)
    return out


def test_a_student_that_answers_as_the_teacher_has_full_scores_and_an_interval_above_zero(compared: Path) -> None:
    scores = _read(compared)["sets"]["held_out"]["scores"]
    for name in ("token_f1", "exact_match", "length_within"):
        assert scores[name]["after"]["mean"] == 1.0, name
    f1 = scores["token_f1"]
    assert f1["before"]["mean"] < 0.5
    assert f1["difference"]["mean"] == pytest.approx(1 - f1["before"]["mean"], abs=1e-5)
    assert 0 < f1["difference"]["low"] <= f1["difference"]["mean"] <= f1["difference"]["high"]
    assert f1["difference"]["excludes_zero"] is True
    assert scores["stopped"]["teacher"] == scores["stopped"]["after"]


def test_means_and_differences_can_be_computed_again_from_the_samples(compared: Path) -> None:
    from toolchain.evaluate.bootstrap import paired_differences

    result = _read(compared)
    interval = result["conditions"]["interval"]
    for part in ("held_out", "out_of_domain"):
        found = result["sets"][part]
        scores = found["scores"]
        before, after = ([entry[side]["samples"] for entry in scores.values()] for side in ("before", "after"))
        again = paired_differences(before, after, resamples=interval["resamples"], seed=interval["seed"])
        for entry, difference in zip(scores.values(), again, strict=True):
            assert len(entry["before"]["samples"]) == len(found["questions"])
            assert entry["difference"]["mean"] == pytest.approx(difference.mean, abs=1e-6)
            assert entry["difference"]["low"] == pytest.approx(difference.low, abs=1e-6)


def test_the_likelihood_is_that_of_the_reference_after_the_rendered_question(
    made: dict[str, Path], compared: Path
) -> None:
    from toolchain.student import load

    model, tokenizer = load.load_model(made["student"], dtype=torch.float32, device="cpu")
    turn = [{"role": "user", "content": "Is 3 a digit?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    answer = tokenizer("3 is a digit.", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = float(logits.log_softmax(-1)[range(len(answer)), answer].mean())
    found = _read(compared)["sets"]["out_of_domain"]
    at = found["questions"].index("q3")
    assert found["scores"]["log_likelihood"]["before"]["samples"][at] == pytest.approx(expected, abs=1e-4)


def test_every_answer_is_there_to_read(made: dict[str, Path], compared: Path) -> None:
    lines = [json.loads(line) for line in (compared / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if line["set"] == "held_out"] == list(NAMES)
    assert all(line["teacher"] == line["student after"] for line in lines if line["set"] == "held_out")
    assert {line["reference"] for line in lines if line["set"] == "out_of_domain"} == {
        f"{at} is a digit." for at in range(6)
    }


def test_times_are_apart_and_the_rest_has_the_same_bytes_in_every_run(
    made: dict[str, Path], compared: Path, tmp_path: Path
) -> None:
    metrics = _compare(made, tmp_path)
    for name in ("compare.json", "answers.jsonl"):
        assert (tmp_path / name).read_bytes() == (compared / name).read_bytes()
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert timing == metrics["timing"]
    assert set(timing) == {"teacher", "student before", "student after"}
    assert all(len(times["answer_seconds"]["samples"]) == 3 for times in timing.values())
    assert "seconds" not in (tmp_path / "compare.json").read_text()


def test_sizes_are_those_of_the_files(made: dict[str, Path], compared: Path) -> None:
    from safetensors.torch import load_file

    for name, folder in (("teacher", "teacher"), ("student before", "student")):
        weights = load_file(made[folder] / "model.safetensors")
        found = _read(compared)["models"][name]
        assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
        assert found["weight_bytes"] == (made[folder] / "model.safetensors").stat().st_size


def test_the_table_shows_the_interval_and_says_what_was_not_measured(made: dict[str, Path], compared: Path) -> None:
    text = (compared / "compare.md").read_text()
    difference = _read(compared)["sets"]["held_out"]["scores"]["token_f1"]["difference"]
    assert f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]" in text
    assert "similarity: compare.embedding_model is not set" in text
    assert "better" not in text


def test_similarity_is_the_cosine_of_the_embeddings(made: dict[str, Path], compared: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from toolchain.student import load

    words = load.load_tokenizer(made["student"])._tokenizer
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=64)], device="cpu")
    model.save(str(tmp_path / "embedder"))
    _compare(made, tmp_path / "out", embedding_model=tmp_path / "embedder")
    result = _read(tmp_path / "out")
    scores = result["sets"]["held_out"]["scores"]["similarity"]
    assert scores["after"]["samples"] == pytest.approx([1.0] * len(NAMES), abs=1e-5)
    line = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    one, other = model.encode([line["student before"], line["teacher"]])
    cosine = float(one @ other / ((one @ one) * (other @ other)) ** 0.5)
    assert scores["before"]["samples"][0] == pytest.approx(cosine, abs=1e-5)
    assert "similarity" not in result["not_measured"]
    # The rest is as it is without it.
    without = _read(compared)["sets"]["held_out"]["scores"]
    assert {
        name: entry for name, entry in result["sets"]["held_out"]["scores"].items() if name != "similarity"
    } == without


def test_too_few_questions_are_said_to_be_too_few(made: dict[str, Path], compared: Path, tmp_path: Path) -> None:
    assert "9 of 9 questions. Too few" in (compared / "compare.md").read_text()
    assert _compare(made, tmp_path, questions=5)["summary"].endswith("(only 5 questions)")


def test_without_other_questions_and_teacher_it_says_so(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = _compare(made, tmp_path, out_of_domain=None, teacher=None)
    assert "out of domain not checked" in metrics["summary"]
    result = _read(tmp_path)
    assert "teacher" not in result["models"]
    assert set(result["sets"]) == {"held_out"}
    assert "not checked: compare.out_of_domain names no file" in (tmp_path / "compare.md").read_text()
    assert "teacher" not in metrics["timing"]


def test_a_loss_of_likelihood_elsewhere_is_called_forgetting(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    worse = tmp_path / "worse"
    shutil.copytree(made["student"], worse)
    weights = load_file(worse / "model.safetensors")
    # Sharper and wrong: the same weights with the order of the final norm's channels turned around.
    weights["model.norm.weight"] = -4 * weights["model.norm.weight"]
    save_file(weights, worse / "model.safetensors", metadata={"format": "pt"})
    metrics = _compare(made, tmp_path / "out", merged=worse)
    assert "out of domain the student forgot: -" in metrics["summary"]
    assert metrics["differences"]["out_of_domain"]["log_likelihood"]["high"] < 0


def test_a_student_compared_with_itself_shows_no_difference(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = _compare(made, tmp_path, merged=made["student"])
    for found in metrics["differences"].values():
        for difference in found.values():
            assert difference == {"mean": 0.0, "low": 0.0, "high": 0.0, "excludes_zero": False}
    assert "out of domain no change is shown" in metrics["summary"]


def test_fewer_questions_are_drawn_from_the_whole_file_and_stay_in_order(made: dict[str, Path], tmp_path: Path) -> None:
    _compare(made, tmp_path, questions=4)
    result = _read(tmp_path)
    asked = result["sets"]["held_out"]["questions"]
    assert len(asked) == 4
    assert asked == [name for name in NAMES if name in asked]
    assert asked != list(NAMES[:4])
    assert result["conditions"]["questions_available"] == {"held_out": 9, "out_of_domain": 6}


def test_an_answer_is_as_long_as_the_recipe_allows(made: dict[str, Path], tmp_path: Path) -> None:
    _compare(made, tmp_path, max_new_tokens=5, out_of_domain=None)
    assert max(_read(tmp_path)["sets"]["held_out"]["scores"]["answer_tokens"]["after"]["samples"]) <= 5


def test_a_question_too_long_to_be_answered_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "word " * 400, "answer": "Yes."}) + "\n")
    with pytest.raises(
        DataError, match=r"long\.jsonl: row 1: the question alone has \d+ tokens; data.max_length is 256"
    ):
        _compare(made, tmp_path / "out", out_of_domain=path)


def test_other_questions_without_answers_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text(json.dumps({"question": "Why?"}) + "\n")
    with pytest.raises(DataError, match=r"bare\.jsonl: row 1: no answer"):
        _compare(made, tmp_path / "out", out_of_domain=path)


def test_damaged_weights_are_an_error_and_no_score(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(made["student"], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        _compare(made, tmp_path / "out", merged=broken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_tells_the_memory_of_each_model_apart(made: dict[str, Path], tmp_path: Path) -> None:
    big = make_tiny_checkpoint(tmp_path / "big", layers=8, hidden=1024)  # more than the workspace of cuBLAS
    timing = _compare(made, tmp_path / "out", student=big, teacher=None)["timing"]
    before, after = (timing[name]["peak_memory_bytes"] for name in ("student before", "student after"))
    assert before > (big / "model.safetensors").stat().st_size
    assert after < (big / "model.safetensors").stat().st_size
    assert "peak memory" not in _read(tmp_path / "out")["not_measured"]


def test_it_runs_as_a_stage_of_a_recipe(made: dict[str, Path], tmp_path: Path) -> None:
    from toolchain.pipeline import CompareSettings, stage_called, without_paths

    settings = without_paths(
        CompareSettings(
            compare=Compare(questions=3, resamples=100, max_new_tokens=4, out_of_domain=made["out_of_domain"]),
            data=Data(train=made["held_out"], held_out=made["held_out"]),
            generate=Generate(sampling_temperature=0.8),
            seed=1,
        )
    ).model_dump(mode="json")
    inputs = {name: made[name] for name in ("held_out", "teacher", "student", "merged", "out_of_domain")}
    metrics = stage_called("compare").run_job(settings, inputs, tmp_path, Silent())
    assert json.loads(json.dumps(metrics)) == metrics
    assert _read(tmp_path)["conditions"]["decoding"] == "greedy"


# --- after a kill


def test_what_is_journalled_is_not_asked_again(
    made: dict[str, Path], compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.student import load

    shutil.copytree(compared / "resume", tmp_path / "resume")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load, "load_model", refuse)
    _compare(made, tmp_path)
    for name in ("compare.json", "timing.json", "answers.jsonl", "compare.md"):
        assert (tmp_path / name).read_bytes() == (compared / name).read_bytes()


@pytest.mark.parametrize("tail", [b'["student before/held_out/0", {"answers": [["le', b"\x00\xff\n", b"{}\n"])
def test_a_damaged_end_of_the_journal_is_asked_again(
    made: dict[str, Path], compared: Path, tmp_path: Path, tail: bytes
) -> None:
    whole = (compared / "resume" / "compare.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "compare.jsonl").write_bytes(b"".join(whole[:2]) + tail)
    _compare(made, tmp_path)
    assert (tmp_path / "compare.json").read_bytes() == (compared / "compare.json").read_bytes()
    again = (tmp_path / "resume" / "compare.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:2] == whole[:2]
    assert len(again) == len(whole)


_CHILD = """
import sys, time
from pathlib import Path
from tests.stages.test_compare import _compare
from toolchain.evaluate import answering
slow = answering._decode
def decode(*arguments):
    time.sleep(0.2)  # long enough to be killed in the middle
    return slow(*arguments)
answering._decode = decode
names = ("teacher", "student", "merged", "held_out", "out_of_domain")
_compare(dict(zip(names, map(Path, sys.argv[2:]))), Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    made: dict[str, Path], compared: Path, tmp_path: Path
) -> None:
    names = ("teacher", "student", "merged", "held_out", "out_of_domain")
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path), *(str(made[name]) for name in names)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1"},
    )
    journal = tmp_path / "resume" / "compare.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "compare.json").exists()
    before = journal.read_bytes()
    _compare(made, tmp_path)
    kept = before.rpartition(b"\n")[0]
    assert journal.read_bytes().startswith(kept)
    assert (tmp_path / "compare.json").read_bytes() == (compared / "compare.json").read_bytes()
