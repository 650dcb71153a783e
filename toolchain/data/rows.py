"""Rows that every stage after `select` works on: a rendered prompt and its answer, as token ids."""

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from toolchain.errors import ArtifactError

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Row:
    """A question as the chat template renders it, and its answer.

    `answer_ids` ends with an eos id exactly when `finish` is "stop". The logits that predict the answer are those at
    positions len(prompt_ids) − 1 … len(prompt_ids) + len(answer_ids) − 2 of the sequence.
    """

    id: str
    messages: tuple[Message, ...]
    """The prompt's turns, without the answer."""
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    finish: Finish

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.answer_ids

    @property
    def key(self) -> str:
        """What the row is filed under in a logit cache: SHA-256 over prompt length and token ids, little-endian u32."""
        return key_of(self.prompt_ids, self.answer_ids)


def key_of(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """SHA-256 of `len(prompt_ids)` and then every id of prompt and answer, each a little-endian u32, in hex."""
    ids = [len(prompt_ids), *prompt_ids, *answer_ids]
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()


def row_to_json(row: Row) -> str:
    return json.dumps(
        {
            "id": row.id,
            "messages": [message.as_dict() for message in row.messages],
            "answer": row.answer,
            "prompt_ids": row.prompt_ids,
            "answer_ids": row.answer_ids,
            "finish": row.finish,
        },
        ensure_ascii=False,
    )


def row_from_json(text: str) -> Row:
    raw = json.loads(text)
    return Row(
        id=raw["id"],
        messages=tuple(Message(turn["role"], turn["content"]) for turn in raw["messages"]),
        answer=raw["answer"],
        prompt_ids=tuple(raw["prompt_ids"]),
        answer_ids=tuple(raw["answer_ids"]),
        finish=cast(Finish, raw["finish"]),
    )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(row_to_json(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Rows written by `write_rows`. Raises ArtifactError."""
    try:
        # Not splitlines(): a JSON string may hold U+2028 and others that it takes for ends of lines.
        return [row_from_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a file of rows: {error}", hint="run the `select` stage again") from error
