"""Data files in the shapes people have → one typed Example. Any host, no torch."""

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.data.rows import Message
from toolchain.errors import DataError
from toolchain.recipe import DataFormat

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """A question with what was said before it, and the answer where the file has one."""

    id: str
    messages: tuple[Message, ...]
    """Turns up to and with the user's question, which comes last."""
    answer: str | None
    row: int
    """Number of the row in its file, counted from 1 (lines of JSONL, elements of a JSON list)."""
    source: Path

    @property
    def question(self) -> str:
        return self.messages[-1].content

    @property
    def where(self) -> str:
        """How an error names this row."""
        return f"{self.source}: row {self.row}"


class _RowError(Exception):
    """What is wrong with a row; the reader adds file and row number."""


def read_examples(path: Path, *, format: DataFormat, need_answer: bool, system: str | None) -> list[Example]:
    """Read JSONL, or a .json list of objects. Raises DataError, which names the row and the column."""
    raw = _read_rows(path)
    if format == "auto":
        format = _recognise(raw[0][1], f"{path}: row {raw[0][0]}")
    read = _READERS[format]
    examples: list[Example] = []
    seen: dict[str, int] = {}
    for number, columns in raw:
        where = f"{path}: row {number}"
        try:
            turns, answer_column = read(columns)
            messages, answer = _split(turns, answer_column, need_answer=need_answer)
        except _RowError as problem:
            raise DataError(f"{where}: {problem}", hint=f"read as {format}; data.format sets another shape") from None
        if system is not None and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        given = columns.get("id")
        name = given if isinstance(given, str) and given.strip() else f"row-{number}"
        if name in seen:
            raise DataError(f"{where}: id {name!r} is already that of row {seen[name]}", hint="ids must differ")
        seen[name] = number
        examples.append(Example(name, messages, answer, number, path))
    return examples


def check_disjoint(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Raise DataError when a question is on both sides, whatever its case, spacing, punctuation or Unicode form."""
    trained = {folded(example.question): example for example in train}
    for example in held_out:
        twin = trained.get(folded(example.question))
        if twin is not None:
            raise DataError(
                f"{example.where} asks what {twin.where} asks: {example.question.strip()[:80]!r}",
                hint="a held-out question that was trained on proves nothing: remove one of the two",
            )


def folded(text: str) -> str:
    """What stays of a text without case, spacing, punctuation and Unicode form."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(sign)[0] in "PZC" else sign for sign in plain)
    # A question of nothing but punctuation keeps it: otherwise all of those would be the same.
    return " ".join(kept.split()) or plain.strip()


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Numbered objects of the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})",
            hint="save the file as UTF-8",
        ) from None
    rows: list[tuple[int, Any]]
    if path.suffix == ".json":
        whole = _parse(text, f"{path}", first_line=1) if text.strip() else []
        if not isinstance(whole, list):
            raise DataError(
                f"{path}: holds {_kind(whole)}, not a list of rows", hint="for one object a line, name it .jsonl"
            )
        rows = list(enumerate(whole, start=1))
    else:
        # Not splitlines(): a JSON string may hold U+2028 and others that it takes for ends of lines.
        lines = enumerate(text.split("\n"), start=1)
        rows = [(number, _parse(line, f"{path}", first_line=number)) for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path}: no rows", hint="the file is empty")
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: {_kind(row)}, not an object with columns")
    return rows


def _parse(text: str, where: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{where}: line {line}: not JSON: {error.msg} (column {error.colno})",
            hint="JSONL holds one object per line",
        ) from None
    except RecursionError:
        raise DataError(f"{where}: line {first_line}: JSON nested too deep") from None


def _recognise(columns: dict[str, Any], where: str) -> DataFormat:
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if "instruction" in columns:
        return "alpaca"
    if "prompt" in columns:
        return "prompt-completion"
    if "question" in columns:
        return "question-answer"
    raise DataError(
        f"{where}: columns {', '.join(sorted(columns)) or '(none)'} are of no known format",
        hint="known: messages; conversations; instruction, input, output; prompt, completion; question, answer",
    )


Turn = tuple[str, str, str]
"""Role, text, and the column it came from."""


def _text(columns: dict[str, Any], column: str, *, required: bool = True, prefix: str = "") -> str | None:
    value = columns.get(column)
    if value is None:
        if required:
            raise _RowError(f"no column '{prefix}{column}'; found: {', '.join(sorted(columns)) or 'none'}")
        return None
    if not isinstance(value, str):
        raise _RowError(f"'{prefix}{column}' is {_kind(value)}, not text")
    if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise _RowError(f"'{prefix}{column}' has half a surrogate pair, which no UTF-8 file can hold")
    return value


def _pair(question: str, answer: str) -> Callable[[dict[str, Any]], tuple[list[Turn], str]]:
    def read(columns: dict[str, Any]) -> tuple[list[Turn], str]:
        # Conversational prompt-completion: lists of messages on both sides.
        if isinstance(columns.get(question), list):
            turns = _turns(columns, question, "role", "content", {role: role for role in _ROLES})
            if isinstance(columns.get(answer), list):
                turns += _turns(columns, answer, "role", "content", {role: role for role in _ROLES})
                return turns, answer
        else:
            turns = [("user", _text(columns, question) or "", question)]
        said = _text(columns, answer, required=False)
        return turns + ([("assistant", said, answer)] if said is not None else []), answer

    return read


def _alpaca(columns: dict[str, Any]) -> tuple[list[Turn], str]:
    instruction = _text(columns, "instruction") or ""
    more = _text(columns, "input", required=False)
    asked = f"{instruction}\n\n{more}" if instruction.strip() and more and more.strip() else instruction
    said = _text(columns, "output", required=False)
    turns: list[Turn] = [("user", asked, "instruction")]
    before = _text(columns, "system", required=False)
    if before is not None and before.strip():
        turns.insert(0, ("system", before, "system"))
    return turns + ([("assistant", said, "output")] if said is not None else []), "output"


def _sharegpt(columns: dict[str, Any]) -> tuple[list[Turn], str]:
    return _turns(columns, "conversations", "from", "value", _SHAREGPT_ROLES), "conversations"


def _messages(columns: dict[str, Any]) -> tuple[list[Turn], str]:
    return _turns(columns, "messages", "role", "content", {role: role for role in _ROLES}), "messages"


def _turns(columns: dict[str, Any], column: str, who: str, what: str, roles: dict[str, str]) -> list[Turn]:
    if column not in columns:
        raise _RowError(f"no column '{column}'; found: {', '.join(sorted(columns)) or 'none'}")
    turns = columns[column]
    if not isinstance(turns, list) or not turns:
        raise _RowError(f"'{column}' is {_kind(turns)}, not a list of turns" if turns != [] else f"'{column}' is empty")
    found: list[Turn] = []
    for at, turn in enumerate(turns):
        place = f"{column}[{at}]"
        if not isinstance(turn, dict):
            raise _RowError(f"'{place}' is {_kind(turn)}, not an object")
        role = _text(turn, who, prefix=f"{place}.") or ""
        if role not in roles:
            raise _RowError(f"'{place}.{who}' is {role!r}; known: {', '.join(roles)}")
        found.append((roles[role], _text(turn, what, prefix=f"{place}.") or "", f"{place}.{what}"))
    return found


def _split(turns: list[Turn], answer_column: str, *, need_answer: bool) -> tuple[tuple[Message, ...], str | None]:
    """Turns → (messages that end with the question, answer)."""
    answer: str | None = None
    if turns and turns[-1][0] == "assistant":
        _, answer, column = turns[-1]
        turns = turns[:-1]
        if need_answer and not answer.strip():
            raise _RowError(f"'{column}' holds no answer: {answer!r}")
        if not answer.strip():
            answer = None
    elif need_answer:
        raise _RowError(f"no answer in '{answer_column}'")
    if not turns or turns[-1][0] != "user":
        raise _RowError(
            "there is no question: " + (f"the turn before the answer is {turns[-1][0]}" if turns else "no turns")
        )
    for at, (role, text, column) in enumerate(turns):
        if role == "system" and at > 0:
            raise _RowError(f"'{column}': a system turn comes first or not at all")
        if role == "user" and not text.strip():
            raise _RowError(f"'{column}' is blank: {text!r}")
    return tuple(Message(role, text) for role, text, _ in turns), answer


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


_READERS: dict[str, Callable[[dict[str, Any]], tuple[list[Turn], str]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt-completion": _pair("prompt", "completion"),
    "question-answer": _pair("question", "answer"),
}
