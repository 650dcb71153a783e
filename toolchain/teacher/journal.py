"""What every way of asking a teacher shares: the prompts, and the journal of answers that survives a kill."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from toolchain.data.answers import Candidate, candidate_from
from toolchain.data.rows import Message
from toolchain.errors import ArtifactError


@dataclass(frozen=True)
class Prompt:
    """One answer to ask for."""

    number: int
    """What it is filed under in the journal."""
    where: str
    """How an error names its row."""
    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    """As the teacher reads it; empty where an endpoint renders it."""
    limit: int
    """Most answer tokens."""
    seed: int
    """Of its own random draws: the answer does not depend on what else is in a batch."""


class Journal:
    """Answers so far, a line per batch or answer that is done; a line is on the disk before more is asked.

    A last line that a kill cut short is taken off the file. Raises ArtifactError for any other that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.answers: dict[int, Candidate] = {}
        self.facts: list[dict[str, Any]] = []
        """What else the lines say, such as the tokens that a server counted."""
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            self._read(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, answers: Mapping[int, Candidate], **facts: Any) -> None:
        """File answers under the numbers of their prompts."""
        found = {number: asdict(candidate) for number, candidate in answers.items()}
        try:
            self._file.write(json.dumps({"answers": found, **facts}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            # Half a line may be on a full disk: only as the last one can it be told and taken off.
            with contextlib.suppress(OSError):
                self._file.close()
            raise
        self.answers.update(answers)
        self.facts.append(facts)

    def _read(self, path: Path) -> None:
        whole, end, _ = path.read_bytes().rpartition(b"\n")
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(end))
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                facts = json.loads(line)
                answers = {int(at): candidate_from(raw) for at, raw in facts.pop("answers").items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ArtifactError(
                    f"{path}: line {number} is damaged: {error}",
                    hint="take that line out to ask it again, or remove the file to ask everything again",
                ) from error
            self.answers.update(answers)
            self.facts.append(facts)


def speed(*, answers: int, tokens: int, seconds: float) -> dict[str, float | None]:
    """Figures of the manifest; None where nothing was asked."""
    return {
        "decoding_seconds": seconds,
        "answers_per_second": answers / seconds if seconds else None,
        "answer_tokens_per_second": tokens / seconds if seconds else None,
    }
