"""Results that survive a kill: one JSON line each, on the disk before the next is computed."""

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from toolchain.errors import ArtifactError


class Journal:
    """Values by key. A last line that a kill cut short is taken off; any other that cannot be read is an ArtifactError.

    Keys say all that the value depends on, within the stage's own fingerprint.
    """

    def __init__(self, path: Path) -> None:
        self._values: dict[str, Any] = {}
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            self._read(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, key: str, value: Any) -> Any:
        """File `value` under `key` and hand it back."""
        try:
            self._file.write(json.dumps([key, value]) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            # Half a line may be on a full disk: only as the last one can it be told and taken off.
            with contextlib.suppress(OSError):
                self._file.close()
            raise
        self._values[key] = value
        return value

    def _read(self, path: Path) -> None:
        whole, end, _ = path.read_bytes().rpartition(b"\n")
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(end))
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                key, value = json.loads(line)
                self._values[str(key)] = value
            except (ValueError, TypeError) as error:
                raise ArtifactError(
                    f"{path}: line {number} is damaged: {error}",
                    hint="take that line out to compute it again, or remove the file to compute everything again",
                ) from error
