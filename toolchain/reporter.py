"""How a stage says how far it is. A stage never writes to the terminal: it calls a Reporter, and `cli` draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One bar."""

    def advance(self, amount: float = 1.0) -> None:
        """Move the bar on by `amount` of its units."""


class Reporter(Protocol):
    """Where a stage sends its progress."""

    def start(self, label: str, *, total: float | None, unit: str) -> Task:
        """Open a bar; `total` None when the end is not known. `unit` is singular: "row", "step", "token"."""

    def finish(self, task: Task) -> None:
        """Close the bar."""

    def line(self, text: str) -> None:
        """One line that a person follows, such as the loss."""


@contextmanager
def bar(report: Reporter, label: str, *, total: float | None, unit: str) -> Iterator[Task]:
    """A bar for the length of a `with` block."""
    task = report.start(label, total=total, unit=unit)
    try:
        yield task
    finally:
        report.finish(task)


class _SilentTask:
    def advance(self, amount: float = 1.0) -> None:
        pass


class Silent:
    """A Reporter that says nothing: for tests and for callers with no terminal."""

    def start(self, label: str, *, total: float | None, unit: str) -> Task:
        return _SilentTask()

    def finish(self, task: Task) -> None:
        pass

    def line(self, text: str) -> None:
        pass
