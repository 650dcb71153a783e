"""Answers of a tiny teacher: by Transformers, by llama.cpp inside the process, and by the pinned llama-server."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from tests.lines import Lines
from tests.stages.gguf_files import serving, to_gguf
from tests.tiny import make_tiny_checkpoint
from toolchain import errors
from toolchain.data.answers import Answered, read_answers
from toolchain.data.rows import Message
from toolchain.errors import DataError, HostError, ModelError
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.recipe import Data, Endpoint, Generate, SpecialTokens, Teacher
from toolchain.reporter import Silent
from toolchain.teacher import decode, generate, gguf_decode
from toolchain.teacher.journal import Prompt

pytestmark = pytest.mark.stages

EOS = 2
NAMES = ("ls", "cp", "mv", "scp", "tail", "ss", "git", "find", "range")


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_decode, "physical_cores", lambda: 1)


def fresh(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("teacher") / "model", hidden=256, layers=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Nine questions of rising length and one held out."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"question": f"What does the command {name} do?" + " Again?" * at, "answer": f"It is number {at}."}
        for at, name in enumerate(NAMES)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.jsonl").write_text(json.dumps({"question": "How do I delete a file?"}) + "\n")
    return {name: folder / f"{name}.jsonl" for name in ("train", "held_out")}


def answer(
    files: dict[str, Path], out: Path, *, report: Silent | None = None, data: dict[str, Any] | None = None, **given: Any
) -> tuple[list[Answered], dict[str, Any]]:
    """Run the stage with `given`: who answers, and settings of [generate]."""
    who = {key: given.pop(key, None) for key in ("teacher", "gguf", "endpoint", "llama")}
    out.mkdir(exist_ok=True)
    metrics = generate.run(
        Generate(**{"max_new_tokens": 12, "batch_size": 4, **given}),
        Data(train=files["train"], held_out=files["held_out"], **(data or {})),
        seed=1,
        **who,
        load_in_4bit=False,
        train=files["train"],
        held_out=files["held_out"],
        out=out,
        report=report or Silent(),
    )
    return read_answers(out / generate.OUTPUT), metrics


def ids_of(answers: Sequence[Answered]) -> list[tuple[int, ...] | None]:
    return [candidate.ids for answered in answers for candidate in answered.candidates]


# --- By Transformers.


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_batched_answers_are_those_of_one_question_at_a_time(
    teacher: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, penalty: float
) -> None:
    from transformers import AutoModelForCausalLM

    from toolchain.student import precision

    # Sixteen-bit sums depend on the shape of the batch, and a near-tie may fall the other way.
    monkeypatch.setattr(precision, "decoding_type", lambda device: torch.float32)
    found, metrics = answer(files, tmp_path / "out", teacher=teacher, repetition_penalty=penalty)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    for answered in found:
        prompt = torch.tensor([answered.prompt_ids])
        with torch.inference_mode():
            whole = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=12,
                do_sample=False,
                repetition_penalty=penalty,
            )
        assert tuple(whole[0, prompt.shape[1] :].tolist()) == answered.candidates[0].ids
    assert [answered.id for answered in found] == [*(f"row-{at}" for at in range(1, 10)), "row-1"]
    assert [answered.set for answered in found] == ["train"] * 9 + ["held_out"]
    assert metrics["candidates"] == 10


def test_eos_ends_an_answer_exactly_when_it_stopped(teacher: Path, files: dict[str, Path], tmp_path: Path) -> None:
    found, metrics = answer(files, tmp_path, teacher=teacher, sampling_temperature=5.0, max_new_tokens=200)
    candidates = [answered.candidates[0] for answered in found]
    assert {candidate.finish for candidate in candidates} >= {"stop"}, "proves nothing without an answer that stopped"
    for candidate in candidates:
        assert candidate.ids is not None
        assert (candidate.ids[-1] == EOS) == (candidate.finish == "stop")
        assert EOS not in candidate.ids[:-1]
        assert "<|im_end|>" not in candidate.text
    assert metrics["cut_off"] == sum(candidate.finish == "length" for candidate in candidates)


def test_candidates_of_a_question_differ_and_do_not_depend_on_the_batch(
    teacher: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.student import precision

    monkeypatch.setattr(precision, "decoding_type", lambda device: torch.float32)
    settings: dict[str, Any] = {"teacher": teacher, "candidates": 3, "sampling_temperature": 1.0, "sampling_top_p": 0.9}
    found, _ = answer(files, tmp_path / "four", **settings)
    assert all(len({candidate.ids for candidate in answered.candidates}) == 3 for answered in found)
    again, _ = answer(files, tmp_path / "seven", batch_size=7, **settings)
    # In float32 a border between two tokens moves by little, so almost no draw falls on the other side.
    same = [one == other for one, other in zip(ids_of(found), ids_of(again), strict=True)]
    assert sum(same) >= len(same) - 3


def test_a_sampled_token_comes_as_often_as_it_should() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).expand(4000, 4)
    draw = torch.arange(4000, dtype=torch.float64) / 4000
    settings = Generate(sampling_temperature=2.0)
    tokens = decode.Sampling(settings)(logits, None, draw)
    expected = (logits[0] / 2.0).softmax(-1)
    assert torch.allclose(tokens.bincount(minlength=4) / 4000, expected, atol=1e-3)
    nucleus = decode.Sampling(settings.model_copy(update={"sampling_top_p": 0.7}))(logits, None, draw)
    assert torch.allclose(nucleus.bincount(minlength=4) / 4000, torch.tensor([0.6225, 0.3775, 0, 0]), atol=1e-3)
    least = decode.Sampling(settings.model_copy(update={"sampling_top_p": 1e-6}))(logits, None, draw)
    assert set(least.tolist()) == {0}


def test_a_resumed_generation_asks_only_what_is_missing_and_answers_the_same(
    teacher: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"teacher": teacher, "sampling_temperature": 1.0}
    whole, cut = fresh(tmp_path / "whole"), fresh(tmp_path / "cut")
    answer(files, whole, **settings)
    journal = (whole / "resume" / generate.OUTPUT).read_bytes()
    first = journal.index(b"\n") + 1
    fresh(cut / "resume")
    (cut / "resume" / generate.OUTPUT).write_bytes(journal[: first + 7])
    _, metrics = answer(files, cut, **settings)
    assert metrics["answers_resumed"] == 4
    assert (cut / generate.OUTPUT).read_bytes() == (whole / generate.OUTPUT).read_bytes()
    assert (cut / "resume" / generate.OUTPUT).read_bytes() == journal
    _, metrics = answer(files, cut, **settings)
    assert metrics["answers_resumed"] == 10
    assert metrics["answers_per_second"] is None


_KILLED = """
import sys
from pathlib import Path
from tests.stages.test_generate import answer
from toolchain.teacher import decode
real, calls = decode.decode, []
def slow(*arguments, **options):
    if len(calls) == 2:
        print("two are done", flush=True)
        sys.stdin.read()
    calls.append(0)
    return real(*arguments, **options)
decode.decode = slow
answer({"train": Path(sys.argv[1]), "held_out": Path(sys.argv[2])}, Path(sys.argv[3]), teacher=Path(sys.argv[4]))
"""


def test_after_a_kill_the_run_goes_on_and_ends_as_if_there_had_been_none(
    teacher: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    argv = [str(files["train"]), str(files["held_out"]), str(tmp_path / "killed"), str(teacher)]
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"two are done\n"
        child.send_signal(signal.SIGKILL)
    _, metrics = answer(files, tmp_path / "killed", teacher=teacher)
    assert metrics["answers_resumed"] == 8
    answer(files, tmp_path / "whole", teacher=teacher)
    written = [(tmp_path / name / generate.OUTPUT).read_bytes() for name in ("killed", "whole")]
    assert written[0] == written[1]


def _out_of_memory_above(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have every batch of more than `rows` fail as on a full GPU; the sizes that were tried."""
    real = decode.decode
    sizes: list[int] = []

    def full(model: Any, batch: Sequence[Prompt], **options: Any) -> list[decode.Decoded]:
        sizes.append(len(batch))
        if len(batch) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, **options)

    monkeypatch.setattr(decode, "decode", full)
    return sizes


def test_a_full_gpu_halves_the_batch_once_and_says_so(
    teacher: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = _out_of_memory_above(2, monkeypatch)
    report = Lines()
    found, metrics = answer(files, tmp_path, teacher=teacher, report=report)
    assert len(found) == 10
    assert sizes == [4, 2, 2, 2, 2, 2]
    assert report.lines == ["GPU memory is too small for 4 answers at a time: going on with 2"]
    assert metrics["decoding_batch_size"] == 2


def test_a_gpu_too_small_for_one_answer_is_an_error_with_what_to_do(
    teacher: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _out_of_memory_above(0, monkeypatch)
    with pytest.raises(HostError, match=r"too small for one answer \(.*row 1: \d+ \+ 12 tokens\)") as caught:
        answer(files, tmp_path, teacher=teacher)
    assert "generate.max_new_tokens" in str(caught.value.hint)


def test_a_question_that_fills_the_teachers_context_is_named(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "ls " * 2000}) + "\n")
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"question": "cp?"}) + "\n")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held_out")}
    with pytest.raises(DataError, match=r"train\.jsonl: row 1: the question has \d+ tokens, .* made for 1024"):
        answer(files, tmp_path / "out", teacher=teacher)


# --- By the data set.


def test_answers_of_the_data_set_need_no_teacher(files: dict[str, Path], tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"question": "How?", "answer": "So."}) + "\n")
    found, metrics = answer({**files, "held_out": held_out}, tmp_path / "out", answers="dataset")
    assert metrics["engine"] == "data set"
    assert [answered.reference for answered in found][-2:] == ["It is number 8.", "So."]
    for answered in found:
        assert answered.prompt_ids is None
        (candidate,) = answered.candidates
        assert (candidate.text, candidate.ids, candidate.finish) == (answered.reference, None, "stop")


@pytest.mark.parametrize("columns", [{"text": "a"}, {"input": "a", "output": "b"}, {"Instruction": "a"}, {}])
def test_a_data_set_in_another_format_is_one_clear_error(
    files: dict[str, Path], tmp_path: Path, columns: dict[str, str]
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps(columns) + "\n")
    with pytest.raises(DataError, match=r"row 1: columns .* are of no known format") as caught:
        answer({**files, "train": train}, tmp_path / "out", answers="dataset")
    assert "instruction, input, output" in str(caught.value.hint)
    assert all(column in caught.value.message for column in columns)
    with pytest.raises(DataError, match="row 1: no column 'instruction'; found: "):
        answer({**files, "train": train}, tmp_path / "named", answers="dataset", data={"format": "alpaca"})


def test_a_training_question_that_is_held_out_too_stops_before_anything_is_asked(
    files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"asks what .* asks"):
        answer({**files, "held_out": files["train"]}, tmp_path / "out", teacher=Path("nowhere"))


def test_a_template_that_refuses_a_turn_names_the_row(teacher: Path, files: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(teacher, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    with pytest.raises(ModelError, match=r"train\.jsonl: row 1: the chat template refuses it: no system turns"):
        answer(files, tmp_path / "out", teacher=folder)


# --- By llama.cpp.


@pytest.fixture(scope="module")
def gguf(teacher: Path, llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from toolchain.gguf import convert

    out = tmp_path_factory.mktemp("convert")
    to_gguf(teacher, out, llama)
    return out / convert.OUTPUT


@pytest.fixture(scope="module")
def described(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the `teacher` stage makes of a GGUF that llama.cpp runs."""
    from toolchain.teacher import checkpoint

    out = tmp_path_factory.mktemp("described")
    settings = Teacher(model=gguf, engine="llama.cpp", special_tokens=SpecialTokens(unk="<unk>"))
    metrics = checkpoint.prepare(settings, model=gguf, out=out, report=Silent())
    assert metrics["vocabulary_rows"] == 512
    return out / "checkpoint"


@pytest.mark.llama_cpp
def test_a_gguf_that_llama_cpp_runs_is_described_without_weights(teacher: Path, described: Path) -> None:
    from toolchain.student import checkpoint_files, load

    assert not list(described.glob("*.safetensors"))
    config = checkpoint_files.read_config(described)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (512, 1024)
    ours, theirs = load.load_tokenizer(described), load.load_tokenizer(teacher)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert load.stop_ids(described, ours) == load.stop_ids(teacher, theirs) == (EOS,)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_llama_cpp_and_transformers_mostly_give_the_same_answers(
    teacher: Path,
    gguf: Path,
    described: Path,
    llama: LlamaCpp,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    penalty: float,
) -> None:
    from toolchain.student import precision

    monkeypatch.setattr(precision, "decoding_type", lambda device: torch.float32)
    settings: dict[str, Any] = {"repetition_penalty": penalty}
    by_transformers, _ = answer(files, tmp_path / "a", teacher=teacher, **settings)
    # Three places for ten prompts of different lengths: each is used again.
    by_llama, metrics = answer(
        files, tmp_path / "b", teacher=described, gguf=gguf, llama=llama, batch_size=3, **settings
    )
    assert [one.prompt_ids for one in by_llama] == [one.prompt_ids for one in by_transformers]
    same = [one == other for one, other in zip(ids_of(by_llama), ids_of(by_transformers), strict=True)]
    # The cache of llama.cpp is in 16 bits: a near-tie may fall the other way.
    assert sum(same) >= len(same) - 3
    assert (metrics["engine"], metrics["decoding_batch_size"]) == ("llama.cpp", 3)


@pytest.mark.llama_cpp
def test_answers_of_llama_cpp_end_with_their_eos_and_a_resumed_run_asks_what_is_missing(
    gguf: Path, described: Path, llama: LlamaCpp, files: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"teacher": described, "gguf": gguf, "llama": llama, "sampling_temperature": 5.0}
    found, _ = answer(files, tmp_path / "whole", max_new_tokens=200, **settings)
    candidates = [answered.candidates[0] for answered in found]
    assert {candidate.finish for candidate in candidates} >= {"stop"}, "proves nothing without an answer that stopped"
    for candidate in candidates:
        assert candidate.ids is not None
        assert (candidate.ids[-1] == EOS) == (candidate.finish == "stop")
        assert EOS not in candidate.ids[:-1]
    lines = (tmp_path / "whole" / "resume" / generate.OUTPUT).read_bytes().splitlines(keepends=True)
    assert len(lines) == 10, "an answer is saved as soon as it ends"
    fresh(tmp_path / "cut" / "resume")
    (tmp_path / "cut" / "resume" / generate.OUTPUT).write_bytes(b"".join(lines[:6]) + b'{"ans')
    again, metrics = answer(files, tmp_path / "cut", max_new_tokens=200, **settings)
    assert metrics["answers_resumed"] == 6
    assert [answered.id for answered in again] == [answered.id for answered in found]


@pytest.mark.llama_cpp
def test_long_prompts_are_read_in_parts_beside_answers_that_go_on(
    teacher: Path, gguf: Path, described: Path, llama: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.student import precision

    monkeypatch.setattr(precision, "decoding_type", lambda device: torch.float32)
    questions = ["ls?", "Show the last ten lines of a log file. " * 30, "cp?", "Delete every file. " * 60, "mv?"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"question": "git?"}) + "\n")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held_out")}
    by_llama, _ = answer(files, tmp_path / "a", teacher=described, gguf=gguf, llama=llama, batch_size=4)
    by_transformers, _ = answer(files, tmp_path / "b", teacher=teacher)
    assert sum(len(answered.prompt_ids or ()) for answered in by_llama) > 512
    same = [one == other for one, other in zip(ids_of(by_llama), ids_of(by_transformers), strict=True)]
    assert sum(same) >= len(same) - 2


# --- By llama-server, as any OpenAI-compatible endpoint.


@pytest.fixture(scope="module")
def server(gguf: Path, llama: LlamaCpp) -> Iterator[str]:
    with serving(llama, gguf, "-c", "1024", "-np", "2", "--api-key", "sk-test", "--alias", "tiny") as url:
        yield url


def _is_within(text: str, whole: str) -> bool:
    signs = iter(whole)
    return all(sign in signs for sign in text)


@pytest.mark.llama_cpp
def test_a_llama_server_answers_as_the_gguf_does(
    server: str,
    gguf: Path,
    described: Path,
    llama: LlamaCpp,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("TINY_KEY", "sk-test")
    endpoint = Endpoint(url=server, model="tiny", key_variable="TINY_KEY", concurrency=2)
    served, metrics = answer(files, tmp_path / "served", endpoint=endpoint)
    local, _ = answer(files, tmp_path / "local", teacher=described, gguf=gguf, llama=llama)
    assert all(answered.prompt_ids is None for answered in served)
    assert all(candidate.ids is None for answered in served for candidate in answered.candidates)
    # A random model also writes bytes that are no UTF-8, and the two sides spell those differently: what llama.cpp's
    # tokens say in plain characters stands in what the server says, in that order.
    same = [
        _is_within(other.candidates[0].text.replace("\ufffd", "").strip(), one.candidates[0].text)
        for one, other in zip(served, local, strict=True)
    ]
    assert sum(same) >= len(same) - 2
    assert sum(_is_within(served[0].candidates[0].text, other.candidates[0].text) for other in local) <= 2
    assert metrics["prompt_tokens"] == sum(len(answered.prompt_ids or ()) for answered in local)
    assert metrics["requests"] == 10
    sampled, _ = answer(
        files, tmp_path / "sampled", endpoint=endpoint, candidates=2, sampling_temperature=1.5, sampling_top_p=0.95
    )
    assert sum(one.candidates[0].text != one.candidates[1].text for one in sampled) >= 8


@pytest.mark.llama_cpp
def test_a_llama_server_says_what_is_wrong(
    server: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("TINY_KEY", "sk-wrong")
    endpoint = Endpoint(url=server, model="tiny", key_variable="TINY_KEY")
    with pytest.raises(errors.EndpointError, match="refuses the key in TINY_KEY"):
        answer(files, tmp_path / "key", endpoint=endpoint)
    monkeypatch.setenv("TINY_KEY", "sk-test")
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "ls " * 2000}) + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl: row 1: too long for the model behind"):
        answer({**files, "train": tmp_path / "train.jsonl"}, tmp_path / "long", endpoint=endpoint)
    with pytest.raises(errors.EndpointError, match="no /chat/completions there"):
        answer(files, tmp_path / "path", endpoint=endpoint.model_copy(update={"url": f"{server}/v9"}))


def test_the_prompts_are_what_the_data_says(files: dict[str, Path], teacher: Path, tmp_path: Path) -> None:
    found, _ = answer(files, tmp_path, teacher=teacher, data={"system": "Be brief."})
    assert found[0].messages == (Message("system", "Be brief."), Message("user", "What does the command ls do?"))
    assert found[0].reference == "It is number 0."
    assert found[-1].reference is None
