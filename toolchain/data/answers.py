"""Answers as the teacher gave them, before anything is chosen: `generate` writes them, `select` makes rows of them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from toolchain.data.rows import Finish, Message
from toolchain.errors import ArtifactError

SetName = Literal["train", "held_out"]
SETS: tuple[SetName, ...] = ("train", "held_out")


@dataclass(frozen=True)
class Candidate:
    """One answer."""

    text: str
    ids: tuple[int, ...] | None
    """The teacher's tokens, with the eos that ended them; None where they are not known."""
    finish: Finish


@dataclass(frozen=True)
class Answered:
    """A question and what was answered."""

    id: str
    set: SetName
    messages: tuple[Message, ...]
    reference: str | None
    """The data set's own answer."""
    prompt_ids: tuple[int, ...] | None
    """The question as the teacher read it; None where that is not known."""
    candidates: tuple[Candidate, ...]

    @property
    def question(self) -> str:
        return self.messages[-1].content


def write_answers(path: Path, answers: Iterable[Answered]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for answered in answers:
            out.write(json.dumps(asdict(answered), ensure_ascii=False) + "\n")


def read_answers(path: Path) -> list[Answered]:
    """Answers written by `write_answers`, in the order of the file. Raises ArtifactError."""
    try:
        # Not splitlines(): a JSON string may hold U+2028 and others that it takes for ends of lines.
        return [_from_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a file of answers: {error}", hint="run the `generate` stage again") from error


def candidate_from(raw: dict[str, object]) -> Candidate:
    """What `asdict` and JSON made of a Candidate. Raises KeyError, TypeError, ValueError."""
    text, ids, finish = raw["text"], raw["ids"], raw["finish"]
    if not isinstance(text, str) or not isinstance(ids, list | None):
        raise TypeError("an answer without text")
    if finish not in ("stop", "length"):
        raise ValueError(f"finish is {finish!r}")
    return Candidate(text, None if ids is None else tuple(int(number) for number in ids), finish)


def _from_json(line: str) -> Answered:
    raw = json.loads(line)
    if raw["set"] not in SETS:
        raise ValueError(f"set is {raw['set']!r}")
    return Answered(
        id=raw["id"],
        set=raw["set"],
        messages=tuple(Message(turn["role"], turn["content"]) for turn in raw["messages"]),
        reference=raw["reference"],
        prompt_ids=None if raw["prompt_ids"] is None else tuple(raw["prompt_ids"]),
        candidates=tuple(candidate_from(candidate) for candidate in raw["candidates"]),
    )
