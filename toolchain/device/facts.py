"""Files of this machine that hold facts, and what a fact that cannot be read is. Loaded before the server's spawn."""

from __future__ import annotations

import os


class FactError(Exception):
    """A fact that should be there and cannot be read: the reason, and what helps."""

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


class Files:
    """Paths are given as they are on the machine."""

    def exists(self, path: str) -> bool:
        return os.path.exists(self._at(path))

    def read(self, path: str) -> str | None:
        """A file's text, stripped; None when there is no such file. Raises FactError when it is closed to us."""
        try:
            with open(self._at(path), encoding="utf-8", errors="replace") as file:
                return file.read().strip("\0 \n")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise FactError(f"{path} cannot be read: {error.strerror}") from None

    def number(self, path: str) -> int | None:
        """A file that holds one whole number; None when there is none. Raises FactError."""
        text = self.read(path)
        return None if text is None else parse_int(text, path)

    def text(self, path: str) -> str | None:
        """A file's text; None also when it is empty or cannot be read."""
        try:
            return self.read(path) or None
        except FactError:
            return None

    def _at(self, path: str) -> str:
        return path


def parse_int(text: str, source: str) -> int:
    """The whole number that `source` says. Raises FactError."""
    try:
        return int(text)
    except ValueError:
        raise FactError(f"{source} says {text[:60]!r}, which is no number") from None
