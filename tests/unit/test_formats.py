"""Data files in five shapes, and what is said about those that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.data.formats import Example, check_disjoint, read_examples
from toolchain.data.rows import Message
from toolchain.errors import DataError
from toolchain.recipe import DataFormat

USER = Message("user", "What is ls?")
SHAPES: dict[DataFormat, dict[str, Any]] = {
    "alpaca": {"instruction": "What is ls?", "input": "", "output": "A program."},
    "sharegpt": {"conversations": [{"from": "human", "value": "What is ls?"}, {"from": "gpt", "value": "A program."}]},
    "messages": {
        "messages": [{"role": "user", "content": "What is ls?"}, {"role": "assistant", "content": "A program."}]
    },
    "prompt-completion": {"prompt": "What is ls?", "completion": "A program."},
    "question-answer": {"question": "What is ls?", "answer": "A program.", "source": "manual", "level": 3},
}


def _write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _read(
    path: Path, *, format: DataFormat = "auto", need_answer: bool = True, system: str | None = None
) -> list[Example]:
    return read_examples(path, format=format, need_answer=need_answer, system=system)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_recognised_and_read_alike(tmp_path: Path, shape: DataFormat) -> None:
    path = _write(tmp_path / "a.jsonl", SHAPES[shape])
    for format in ("auto", shape):
        (example,) = _read(path, format=format)
        assert example == Example("row-1", (USER,), "A program.", 1, path)


def test_a_json_list_is_read_like_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([SHAPES["alpaca"], {**SHAPES["alpaca"], "id": "second"}], indent=2))
    assert [example.id for example in _read(path)] == ["row-1", "second"]


def test_the_last_of_several_assistant_turns_is_the_answer(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "a?"), ("assistant", "A."), ("user", "b?"), ("assistant", "B.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (example,) = _read(_write(tmp_path / "a.jsonl", row), system="unused")
    assert example.messages == tuple(Message(role, text) for role, text in turns[:-1])
    assert example.answer == "B."
    assert example.question == "b?"


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    (example,) = _read(_write(tmp_path / "a.jsonl", {"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"}))
    assert example.question == "Sort.\n\n3 1 2"


def test_a_system_message_is_put_where_there_is_none(tmp_path: Path) -> None:
    (example,) = _read(_write(tmp_path / "a.jsonl", SHAPES["messages"]), system="Be brief.")
    assert example.messages == (Message("system", "Be brief."), USER)


def test_without_need_of_an_answer_its_absence_is_none(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", {"question": "What is ls?"}, {"question": "What is cp?", "answer": " "})
    assert [example.answer for example in _read(path, need_answer=False)] == [None, None]


def test_line_separators_inside_text_and_blank_lines_do_not_split_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps({"question": "a\u2028b\x85c", "answer": "d"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n".encode())
    (example,) = _read(path)
    assert example.question == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jsonl: no rows"),
        (b"\n \n", r"a\.jsonl: no rows"),
        (b'{"question": "a", "answer": "b"}\n{"question": "\xff"}\n', r"line 2: not UTF-8 \(byte 0xff at offset 47\)"),
        (b'{"question": "a", "answer": "b"}\n{"question": \n', r"line 2: not JSON"),
        (b"[1]\n", r"row 1: a list, not an object"),
        (b'{"text": "a", "more": 1}\n', r"row 1: columns more, text are of no known format"),
        (b'{"question": "a", "answer": "b"}\n{"question": "c"}\n', r"row 2: no answer in 'answer'"),
        (b'{"question": "a", "answer": " \\t"}\n', r"row 1: 'answer' holds no answer: ' \\t'"),
        (b'{"question": "a", "answer": null}\n', r"row 1: no answer in 'answer'"),
        (b'{"question": "a", "answer": 7}\n', r"row 1: 'answer' is a number, not text"),
        (b'{"question": "  ", "answer": "b"}\n', r"row 1: 'question' is blank"),
        (b'{"prompt": "a", "completion": "b"}\n{"question": "a"}\n', r"row 2: no column 'prompt'; found: question"),
        (b'{"messages": []}\n', r"row 1: 'messages' is empty"),
        (b'{"messages": "a"}\n', r"row 1: 'messages' is text, not a list"),
        (b'{"messages": ["a"]}\n', r"row 1: 'messages\[0\]' is text, not an object"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}\n', r"'messages\[0\].role' is 'bot'; known: system, user"),
        (b'{"messages": [{"role": "user"}]}\n', r"row 1: no column 'messages\[0\].content'"),
        (b'{"conversations": [{"from": "gpt", "value": "a"}]}\n', r"row 1: there is no question"),
        (
            b'{"id": "x", "question": "a", "answer": "b"}\n{"id": "x", "question": "c", "answer": "d"}\n',
            r"row 2: id 'x' is already that of row 1",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        _read(path)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        _read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("twin", ["what is ls", "  What  is\tLS ?", "Ｗhat is ls？"])
def test_a_question_on_both_sides_is_found_in_any_spelling(tmp_path: Path, twin: str) -> None:
    train = _read(_write(tmp_path / "t.jsonl", {"question": "And cp?"}, {"question": "What is ls?"}), need_answer=False)
    held_out = _read(_write(tmp_path / "h.jsonl", {"question": twin}), need_answer=False)
    with pytest.raises(DataError, match=r"h\.jsonl: row 1 asks what .*t\.jsonl: row 2 asks"):
        check_disjoint(train, held_out)


def test_questions_that_differ_pass(tmp_path: Path) -> None:
    train = _read(_write(tmp_path / "t.jsonl", {"question": "???"}, {"question": "What is ls?"}), need_answer=False)
    held_out = _read(_write(tmp_path / "h.jsonl", {"question": "!"}, {"question": "What is lsof?"}), need_answer=False)
    check_disjoint(train, held_out)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda part: st.lists(part, max_size=3)))
def test_no_value_of_a_column_is_a_crash(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    for column in ("messages", "conversations", "prompt", "question", "instruction"):
        path = _write(folder / "a.jsonl", {column: value, "answer": value, "output": value, "completion": value})
        try:
            (example,) = _read(path, need_answer=False)
        except DataError:
            continue
        assert example.question.strip()
