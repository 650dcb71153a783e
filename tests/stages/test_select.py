"""Which answers become rows, in whose tokens, and what is counted of the others."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.tiny import make_tiny_checkpoint
from toolchain.data.answers import Answered, Candidate, write_answers
from toolchain.data.rows import Message, Row, read_rows
from toolchain.errors import ArtifactError, DataError, ModelError
from toolchain.recipe import Data, Select
from toolchain.reporter import Silent
from toolchain.student import load
from toolchain.teacher import select
from toolchain.teacher.generate import render

pytestmark = pytest.mark.stages

EOS = 2
HELD_OUT = "How do I delete a file?"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("student") / "model", layers=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with another tokenizer."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("other") / "model", layers=1, vocabulary=330)


@pytest.fixture(scope="module")
def tokenizer(student: Path) -> Any:
    return load.load_tokenizer(student)


def candidate(tokenizer: Any, text: str, *, finish: str = "stop") -> Candidate:
    """As a teacher would spell it: letter by letter, as no tokenizer would."""
    ids = [number for sign in text for number in tokenizer(sign, add_special_tokens=False)["input_ids"]]
    return Candidate(text, (*ids, EOS) if finish == "stop" else tuple(ids), finish)  # type: ignore[arg-type]


def asked(
    tokenizer: Any, question: str, *candidates: Candidate, name: str = "", reference: str | None = None
) -> Answered:
    messages = (Message("user", question),)
    prompt = render(tokenizer, messages, where="test")
    given = "held_out" if question == HELD_OUT else "train"
    return Answered(name or question, given, messages, reference, prompt, candidates)  # type: ignore[arg-type]


def chosen(
    folder: Path,
    answers: Sequence[Answered],
    student: Path,
    *,
    verdict: str = "same",
    ids: int = 512,
    embedding_model: Path | None = None,
    data: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[list[Row], list[Row], dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    write_answers(folder / "answers.jsonl", answers)
    (folder / "vocabulary.json").write_text(json.dumps({"verdict": verdict, "ids": ids}))
    metrics = select.run(
        Select(**settings),
        Data(train=folder, held_out=folder, **(data or {})),
        max_new_tokens=9,
        answers=folder / "answers.jsonl",
        student=student,
        vocabulary=folder / "vocabulary.json",
        embedding_model=embedding_model,
        out=folder,
        report=Silent(),
    )
    return read_rows(folder / "train.jsonl"), read_rows(folder / "held_out.jsonl"), metrics


@pytest.fixture
def held_out(tokenizer: Any) -> Answered:
    return asked(tokenizer, HELD_OUT, candidate(tokenizer, "Use find."))


# --- Whose tokens.


@pytest.mark.parametrize("verdict", ["same", "padded"])
def test_common_tokens_are_taken_as_the_teacher_chose_them(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path, verdict: str
) -> None:
    said = candidate(tokenizer, "It lists files.")
    (row,), _, metrics = chosen(tmp_path, [asked(tokenizer, "ls?", said), held_out], student, verdict=verdict)
    assert row.answer_ids == said.ids
    assert row.prompt_ids == render(tokenizer, row.messages, where="")
    assert row.answer == "It lists files."
    assert metrics["rows_in_teacher_tokens"] == 2


@pytest.mark.parametrize("why", ["different", "unknown", "beyond", "no ids", "other prompt", "other eos", "eos inside"])
def test_otherwise_question_and_answer_are_rendered_for_the_student(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path, why: str
) -> None:
    said = candidate(tokenizer, "It lists files.")
    assert said.ids is not None
    question = asked(tokenizer, "ls?", said)
    ids = 512
    if why == "beyond":
        ids = max(said.ids)
    if why == "no ids":
        question = asked(tokenizer, "ls?", Candidate(said.text, None, "stop"))
    if why == "other prompt":
        question = Answered("ls?", "train", question.messages, None, (5, 6, 7), (said,))
    if why == "other eos":
        question = asked(tokenizer, "ls?", Candidate(said.text, (*said.ids[:-1], 3), "stop"))
    if why == "eos inside":
        question = asked(tokenizer, "ls?", Candidate(said.text, (EOS, *said.ids), "stop"))
    verdict = why if why in ("different", "unknown") else "same"
    (row,), _, _ = chosen(tmp_path, [question, held_out], student, verdict=verdict, ids=ids)
    expected = tokenizer("It lists files.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert list(row.answer_ids) == expected
    assert expected != list(said.ids), "proves nothing when both are spelt alike"


def test_a_student_with_another_tokenizer_gets_its_own_tokens(
    other: Path, tokenizer: Any, held_out: Answered, tmp_path: Path
) -> None:
    question = asked(tokenizer, "ls?", candidate(tokenizer, "It lists files."))
    (row,), _, metrics = chosen(tmp_path, [question, held_out], other, verdict="different", ids=0)
    own = load.load_tokenizer(other)
    assert (
        own.decode(row.token_ids) == "<|im_start|>user\nls?<|im_end|>\n<|im_start|>assistant\nIt lists files.<|im_end|>"
    )
    assert max(row.token_ids) < 330
    assert row.answer_ids[-1] == own.eos_token_id
    assert metrics["rows_in_teacher_tokens"] == 0


def test_a_cut_off_answer_that_is_kept_has_no_eos_either_way(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path
) -> None:
    question = asked(tokenizer, "ls?", candidate(tokenizer, "It lists", finish="length"))
    for verdict in ("same", "different"):
        (row,), _, _ = chosen(tmp_path, [question, held_out], student, verdict=verdict, truncated="keep")
        assert (row.finish, EOS in row.answer_ids) == ("length", False)
        assert tokenizer.decode(row.answer_ids) == "It lists"


def test_line_separators_inside_an_answer_do_not_split_a_row(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path
) -> None:
    text = "one\u2028two\x85three"
    (row,), _, _ = chosen(tmp_path, [asked(tokenizer, "ls?", Candidate(text, None, "stop")), held_out], student)
    assert row.answer == text


# --- What is left out.


def test_what_is_left_out_is_counted_by_set_and_reason(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path
) -> None:
    def made(text: str, **more: str) -> Candidate:
        return candidate(tokenizer, text, **more)

    answers = [
        asked(tokenizer, "good?", made("It is good.")),
        asked(tokenizer, "cut?", made("It is", finish="length")),
        asked(tokenizer, "nothing?", Candidate("", (EOS,), "stop")),
        asked(tokenizer, "blank?", made(" \n ")),
        asked(tokenizer, "no text?", Candidate("", None, "stop")),
        asked(tokenizer, "eos?", Candidate("Write <|im_end|> there.", None, "stop")),
        asked(tokenizer, "short?", made("No.")),
        asked(tokenizer, "long?", made("It goes on, " * 5)),
        asked(tokenizer, "far too long?", made("It goes on and on, " * 30)),
        asked(tokenizer, "a question far too long? " * 40, made("It is good too.")),
        held_out,
        asked(tokenizer, HELD_OUT, made("Use", finish="length"), name="second"),
    ]
    settings: dict[str, Any] = {"min_answer_tokens": 4, "max_answer_tokens": 50}
    data = {"too_long": "drop", "max_length": 300}
    rows, _, metrics = chosen(tmp_path, answers, student, data=data, **settings)
    assert [row.id for row in rows] == ["good?"]
    counted = {key: count for key, count in metrics["dropped"].items() if count}
    assert counted == {
        "train_truncated": 1,
        "train_empty": 3,
        "train_holds_eos": 1,
        "train_answer_too_short": 1,
        "train_answer_too_long": 1,
        "train_too_long": 2,
        "held_out_truncated": 1,
    }
    assert metrics["rows"] == {"train": 1, "held_out": 1}
    assert sum(counted.values()) + 2 == len(answers)


def test_every_row_has_something_to_learn(student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path) -> None:
    said = [Candidate(text, ids, "stop") for text in ("", " ", "x") for ids in (None, (), (EOS,), (EOS, EOS))]
    answers = [asked(tokenizer, f"Question {at}?", each) for at, each in enumerate(said)]
    rows, _, _ = chosen(tmp_path, [*answers, held_out], student)
    assert rows
    assert all(len(row.answer_ids) > 1 and row.answer.strip() for row in rows)


@pytest.mark.parametrize(
    ("question", "text", "says"),
    [
        ("Why? " * 20, "So.", r"train: long: the question alone has \d+ tokens; data.max_length is 40"),
        ("Why?", "So it is. " * 20, r"train: long: question and answer have \d+ tokens; data.max_length is 40"),
    ],
)
def test_a_row_that_is_too_long_is_an_error_unless_it_may_be_dropped(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path, question: str, text: str, says: str
) -> None:
    answers = [
        asked(tokenizer, "ls?", candidate(tokenizer, "Files.")),
        asked(tokenizer, question, candidate(tokenizer, text), name="long"),
        held_out,
    ]
    with pytest.raises(DataError, match=says):
        chosen(tmp_path, answers, student, data={"max_length": 40})
    rows, _, metrics = chosen(tmp_path, answers, student, data={"max_length": 40, "too_long": "drop"})
    assert [row.id for row in rows] == ["ls?"]
    assert metrics["dropped"]["train_too_long"] == 1


def test_when_nothing_is_left_the_counts_are_told(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path
) -> None:
    cut = [asked(tokenizer, f"Question {at}?", candidate(tokenizer, "It", finish="length")) for at in range(3)]
    with pytest.raises(DataError, match=r'train: none of 3 rows is left: \{"train_truncated": 3\}') as caught:
        chosen(tmp_path, [*cut, held_out], student)
    assert "generate.max_new_tokens (9)" in str(caught.value.hint)


def test_repeated_questions_and_answers_go_from_training_only(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path
) -> None:
    said = [
        ("ls?", "It lists."),
        ("LS ?", "Files."),
        ("cp?", "it  lists"),
        ("mv?", "It moves."),
        (HELD_OUT, "It moves."),
    ]
    answers = [asked(tokenizer, question, candidate(tokenizer, text)) for question, text in said]
    rows, others, metrics = chosen(tmp_path, answers, student, duplicates="drop")
    assert [row.id for row in rows] == ["ls?", "mv?"]
    assert len(others) == 1
    assert metrics["dropped"]["train_duplicate"] == 2
    rows, _, metrics = chosen(tmp_path, answers, student)
    assert (len(rows), metrics["dropped"]["train_duplicate"]) == (4, 0)


def test_one_question_after_different_turns_is_no_repetition(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path
) -> None:
    answers = []
    for before in ("About ls.", "About cp."):
        messages = (Message("user", before), Message("assistant", "Yes?"), Message("user", "Go on."))
        said = Candidate(f"{before} it is.", None, "stop")
        answers.append(Answered(before, "train", messages, None, None, (said,)))
    rows, _, _ = chosen(tmp_path, [*answers, held_out], student, duplicates="drop")
    assert len(rows) == 2


# --- Templates.


def _with_template(student: Path, folder: Path, template: str) -> Path:
    import shutil

    shutil.copytree(student, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
            "no longer",
        ),
        ("{% for m in messages %}{{ m['content'] }}.{% endfor %}", "without an eos token"),
    ],
)
def test_a_template_that_cannot_render_answers_is_refused(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path, template: str, says: str
) -> None:
    folder = _with_template(student, tmp_path / "model", template)
    with pytest.raises(ModelError, match=says):
        chosen(tmp_path, [asked(tokenizer, "ls?", candidate(tokenizer, "Files.")), held_out], folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocabulary.json", "{}"),
        ("vocabulary.json", "not JSON"),
        ("answers.jsonl", '{"id": "a"}\n'),
        ("answers.jsonl", "not JSON\n"),
        ("answers.jsonl", '{"id": "a", "set": "test", "messages": []}\n'),
    ],
)
def test_a_tampered_input_is_named(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path, name: str, text: str
) -> None:
    write_answers(tmp_path / "answers.jsonl", [held_out])
    (tmp_path / "vocabulary.json").write_text('{"verdict": "same", "ids": 9}')
    (tmp_path / name).write_text(text)
    with pytest.raises(ArtifactError, match=name):
        select.run(
            Select(),
            Data(train=tmp_path, held_out=tmp_path),
            max_new_tokens=9,
            answers=tmp_path / "answers.jsonl",
            student=student,
            vocabulary=tmp_path / "vocabulary.json",
            embedding_model=None,
            out=tmp_path,
            report=Silent(),
        )


# --- The best of several.


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, student: Path) -> Path:
    """A tiny sentence-transformers model with random weights: texts with the same words are alike."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = load.load_tokenizer(student)._tokenizer
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("embedder") / "model"
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=64)], device="cpu").save(str(path))
    return path


def test_the_candidate_most_like_the_data_sets_answer_is_taken(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path, embedder: Path
) -> None:
    said = [candidate(tokenizer, text) for text in ("The quick brown fox.", "It lists all files.", "Digits 0 1 2.")]
    question = asked(tokenizer, "ls?", *said, reference="It lists files.")
    (row,), _, metrics = chosen(tmp_path, [question, held_out], student, embedding_model=embedder)
    assert row.answer == "It lists all files."
    assert metrics["similarity"]["train"]["rows"] == metrics["similarity"]["train"]["to_the_data_sets_answer"] == 1
    assert 0.5 < metrics["similarity"]["train"]["mean"] < 1
    assert metrics["similarity"]["held_out"] is None
    assert (metrics["candidates"], metrics["fit_candidates"]) == (4, 4)


def test_without_the_data_sets_answer_the_one_most_like_the_others_is_taken(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path, embedder: Path
) -> None:
    said = [
        candidate(tokenizer, text) for text in ("Digits 0 1 2.", "It lists files.", "It lists files here.", "It lists.")
    ]
    question = asked(tokenizer, "ls?", *said)
    (row,), _, metrics = chosen(tmp_path, [question, held_out], student, embedding_model=embedder)
    assert row.answer.startswith("It lists")
    assert metrics["similarity"]["train"]["to_the_data_sets_answer"] == 0


def test_a_candidate_that_is_unfit_is_not_chosen_however_alike(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path, embedder: Path
) -> None:
    best = candidate(tokenizer, "It lists files.", finish="length")
    question = asked(tokenizer, "ls?", best, candidate(tokenizer, "Nothing alike."), reference="It lists files.")
    (row,), _, metrics = chosen(tmp_path, [question, held_out], student, embedding_model=embedder)
    assert row.answer == "Nothing alike."
    assert (metrics["candidates"], metrics["fit_candidates"]) == (3, 2)


def test_a_folder_that_is_no_embedding_model_is_refused(
    student: Path, tokenizer: Any, held_out: Answered, tmp_path: Path
) -> None:
    question = asked(tokenizer, "ls?", candidate(tokenizer, "Files."))
    with pytest.raises(ModelError, match=r"not a sentence-transformers model: no modules\.json"):
        chosen(tmp_path, [question, held_out], student, embedding_model=student)


# --- As the pipeline calls them.


def test_generate_and_select_run_as_stages_of_a_recipe(student: Path, tmp_path: Path) -> None:
    from toolchain.pipeline import stage_called
    from toolchain.recipe import read_recipe

    for name, questions in (("train", ("ls?", "cp?", "mv?")), ("held_out", (HELD_OUT,))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"question": one}) + "\n" for one in questions))
    (tmp_path / "recipe.toml").write_text(
        f"""
        name = "tiny"
        teacher = {{ model = "{student}" }}
        data = {{ train = "train.jsonl", held_out = "held_out.jsonl", max_length = 64 }}
        generate = {{ max_new_tokens = 8 }}
        select = {{ truncated = "keep" }}
        """
    )
    recipe = read_recipe(tmp_path / "recipe.toml")
    given = {"train": tmp_path / "train.jsonl", "held_out": tmp_path / "held_out.jsonl", "teacher": student}
    (tmp_path / "vocabulary.json").write_text('{"verdict": "same", "ids": 512}')
    generate = stage_called("generate")
    generate.run_job(generate.settings(recipe, None).model_dump(mode="json"), given, tmp_path, Silent())
    inputs = {name: tmp_path / file for name, file in (("answers", "answers.jsonl"), ("vocabulary", "vocabulary.json"))}
    stage = stage_called("select")
    metrics = stage.run_job(
        stage.settings(recipe, None).model_dump(mode="json"), {**inputs, "student": student}, tmp_path, Silent()
    )
    assert metrics["rows"] == {"train": 3, "held_out": 1}
    assert metrics["rows_in_teacher_tokens"] == 4


def test_what_decides_over_rows_is_no_setting_of_generate(student: Path, tmp_path: Path) -> None:
    from toolchain.pipeline import stage_called
    from toolchain.recipe import Recipe

    def asked_with(**more: Any) -> Any:
        data = {"train": "t", "held_out": "h", **more}
        recipe = Recipe.model_validate_json(json.dumps({"name": "a", "teacher": {"model": "m"}, "data": data}))
        return stage_called("generate").settings(recipe, None)

    assert asked_with(max_length=99, too_long="drop") == asked_with()
    assert asked_with(system="Be brief.") != asked_with()
