"""Results that survive a kill: one JSON line each, on the disk before the next is computed.

For what can be computed again. Answers that were paid for are in teacher/journal.py, which gives none of them up.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Journal:
    """JSON lines of [key, value]. From the first line on that a kill cut short, the file is cut off.

    A key says all that its value depends on, within the stage's own fingerprint.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        self._values: dict[str, Any] = {}
        self._file = path.open("a+b")
        self._file.seek(0)
        end = 0
        for line in self._file:
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self._values[key] = value
            end += len(line)
        self._file.truncate(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """The value under `key`; `work` makes it if it is not there, and it is on the disk before this returns."""
        if key not in self._values:
            value = work()
            self._file.write(json.dumps([key, value]).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._values[key] = value
        return self._values[key]
