"""A reporter whose lines can be read."""

from toolchain.reporter import Silent


class Lines(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)
