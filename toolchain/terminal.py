"""What a person sees: bars and lines on stderr while stages run. On a pipe: one line per stage, no bars."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.text import Text

from toolchain.artifact import Artifact
from toolchain.reporter import Task
from toolchain.runner import Planned


class _Rate(ProgressColumn):
    """Units per second, as the bar's own unit."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="dim")


class _BarTask:
    def __init__(self, progress: Progress, label: str, total: float | None, unit: str) -> None:
        self._progress = progress
        self.id = progress.add_task(label, total=total, unit=unit)

    def advance(self, amount: float = 1.0) -> None:
        self._progress.advance(self.id, amount)


class _QuietTask:
    def advance(self, amount: float = 1.0) -> None:
        pass


class Terminal:
    """The Reporter of the command line, and the lines that open and close a stage."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = sys.stderr.isatty() and not quiet
        self._quiet = quiet
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._started_s = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def start(self, label: str, *, total: float | None, unit: str) -> Task:
        return _BarTask(self._progress, label, total, unit) if self._live else _QuietTask()

    def finish(self, task: Task) -> None:
        if isinstance(task, _BarTask):
            self._progress.remove_task(task.id)

    def line(self, text: str) -> None:
        """A line such as the loss: for someone who watches, so only on a terminal."""
        if self._live:
            self.console.print(f"  {text}", markup=False, style="dim")

    def say(self, text: str) -> None:
        """A line that is wanted on a pipe too."""
        if not self._quiet:
            self.console.print(text, markup=False)

    def on_step(self, planned: Planned, artifact: Artifact | None) -> None:
        """Called before a step (artifact None) and after it."""
        name = planned.step.name
        if artifact is None:
            self._started_s = time.monotonic()
            self.say(f"▸ {name}: {planned.state} ({planned.why})")
        elif planned.state == "reuse":
            self.say(f"= {name}: reused ({artifact.path.name})")
        else:
            summary = artifact.manifest.metrics.get("summary")
            seconds = time.monotonic() - self._started_s
            self.say(f"✓ {name}: {seconds:.1f} s" + (f" · {summary}" if summary else ""))
