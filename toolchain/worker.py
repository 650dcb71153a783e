"""One stage in a process of its own: the parent's half starts it and relays its events, the child's half runs it.

A launcher (torchrun, `accelerate launch`) makes it several processes, on one host or more, of which the first reports.
A process each keeps memory and the patches of heavy libraries apart, keeps their chatter off the terminal (it goes to
the stage's log), and turns an out-of-memory kill into one clear error. Events are JSON lines on a pipe.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from toolchain import errors
from toolchain.errors import HostError, ToolchainError
from toolchain.process import die_with_parent, stop
from toolchain.reporter import Reporter, Silent, Task

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_AUTO_INSTALL": "0",
    "DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
}
_ENVIRONMENT = {
    **OFFLINE,
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
_EVENT_GAP_S = 0.1
_USES_SCIKIT_LEARN = {"select", "distill", "on_policy", "compare"}
"""Sentence embeddings and Unsloth do. Transformers imports it for a way of decoding that nothing here takes, and with
it SciPy and pandas: 130 MiB and a second of every stage."""


def run_in_worker(
    job: Mapping[str, Any], *, log: Path, report: Reporter, launcher: Sequence[str] = ()
) -> dict[str, Any]:
    """Run one stage (`stage`, `settings`, `inputs`, `out`) in a fresh Python; its metrics come back.

    `launcher` is a command that starts `-m MODULE ARGUMENTS` in several processes. The job is kept beside the log, for
    a launcher on a further host: `… -m toolchain.worker - JOB`. Raises what the stage raised if it is a ToolchainError,
    HostError when it was killed, and StageCrashError for a bug.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    job_file = log.with_suffix(".job.json")
    job_file.write_text(json.dumps(job), encoding="utf-8")
    read_end, write_end = os.pipe()
    # A launcher inherits the descriptor and does not hand it on: its processes open it as their parent's.
    events_at = f"parent:{write_end}" if launcher else str(write_end)
    argv = [*(launcher or (sys.executable,)), "-m", "toolchain.worker", events_at, str(job_file)]
    with log.open("w", encoding="utf-8") as out:
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,  # Ctrl-C reaches us alone, and we end the child in order
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, no locks taken
                text=True,
            )
        except OSError as failure:
            os.close(read_end)
            raise HostError(f"cannot start {argv[0]}: {failure.strerror}", hint="is it on the PATH?") from failure
        finally:
            os.close(write_end)
    try:
        with os.fdopen(read_end, encoding="utf-8") as events:
            outcome = _relay(events, report)
        code = child.wait()
    except BaseException:
        stop(child)
        raise
    if outcome is None:
        raise _died(str(job["stage"]), code, log)
    if "error" in outcome:
        kind = getattr(errors, outcome["error"], None)
        if kind is None:
            raise StageCrashError(str(job["stage"]), outcome["message"], log)
        error: ToolchainError = kind(outcome["message"], hint=outcome["hint"])
        raise error
    metrics: dict[str, Any] = outcome["result"]
    return metrics


class StageCrashError(ToolchainError):
    """A stage stopped on an error that we did not foresee: a bug, with its traceback in the log."""

    def __init__(self, stage: str, message: str, log: Path) -> None:
        hint = f"this is a bug of the toolchain; the traceback is in {log}"
        super().__init__(f"stage {stage} failed unexpectedly: {message}", hint=hint)


def _died(stage: str, code: int, log: Path) -> ToolchainError:
    if code == -signal.SIGKILL:
        hint = "lower the stage's batch settings, or use a machine with more memory; what was saved is kept: run again"
        return HostError(f"stage {stage} was killed: most likely the machine ran out of memory", hint=hint)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return HostError(f"stage {stage} {how}", hint=f"what was saved is kept: run again; its output is in {log}")


def _relay(events: TextIO, report: Reporter) -> dict[str, Any] | None:
    tasks: dict[int, Task] = {}
    outcome: dict[str, Any] | None = None
    for text in events:
        event = json.loads(text)
        if "start" in event:
            tasks[event["start"]] = report.start(event["label"], total=event["total"], unit=event["unit"])
        elif "advance" in event:
            tasks[event["advance"]].advance(event["amount"])
        elif "finish" in event:
            report.finish(tasks.pop(event["finish"]))
        elif "line" in event:
            report.line(event["line"])
        elif outcome is None or "error" not in outcome:
            outcome = event
    return outcome


class _PipeTask:
    def __init__(self, number: int, pipe: "_PipeReporter") -> None:
        self.number = number
        self._pipe = pipe
        self._pending = 0.0
        self._sent_s = 0.0

    def advance(self, amount: float = 1.0) -> None:
        self._pending += amount
        if time.monotonic() - self._sent_s >= _EVENT_GAP_S:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._pipe.send({"advance": self.number, "amount": self._pending})
        self._pending, self._sent_s = 0.0, time.monotonic()


class _PipeReporter:
    """The Reporter of the child's half."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._count = 0

    def send(self, event: dict[str, Any]) -> None:
        self._out.write(json.dumps(event) + "\n")
        self._out.flush()

    def start(self, label: str, *, total: float | None, unit: str) -> Task:
        self._count += 1
        self.send({"start": self._count, "label": label, "total": total, "unit": unit})
        return _PipeTask(self._count, self)

    def finish(self, task: Task) -> None:
        assert isinstance(task, _PipeTask)
        task.flush()
        self.send({"finish": task.number})

    def line(self, text: str) -> None:
        self.send({"line": text})


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def explain(error: BaseException, stage: str) -> dict[str, Any]:
    """The event for a failure: ours as it is, well-known ones of the machine as HostError, others as a bug."""
    if isinstance(error, ToolchainError):
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    full = "No space left on device" in str(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
    if full:
        hint = "free some space, then run again: finished stages and saved progress are kept"
        return {"error": "HostError", "message": f"stage {stage}: no space left on the disk", "hint": hint}
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        hint = f"lower batch_size or batch_tokens of [{stage}] in the recipe, by half to begin with; then run again"
        where = "GPU memory" if type(error).__name__ == "OutOfMemoryError" else "memory"
        return {"error": "HostError", "message": f"stage {stage}: out of {where}: {error}", "hint": hint}
    if isinstance(error, ModuleNotFoundError) and error.name is not None and not error.name.startswith("toolchain"):
        hint = "pip install -c constraints.txt 'toolchain[train,gguf]'; `toolchain doctor` lists what is missing"
        return {"error": "HostError", "message": f"stage {stage} needs the package '{error.name}'", "hint": hint}
    return {"error": "bug", "message": f"{type(error).__name__}: {error}", "hint": None}


def _open_events(where: str) -> TextIO:
    """Where events go: "7", a descriptor; "parent:7", the parent's; "-", nowhere, as on a further host."""
    if where == "-":
        return Path(os.devnull).open("w", encoding="utf-8")
    owner, _, number = where.rpartition(":")
    if owner:
        return Path(f"/proc/{os.getppid()}/fd/{number}").open("w", encoding="utf-8")
    return os.fdopen(int(number), "w", encoding="utf-8")


def main() -> int:
    """The child's half. Arguments: where events go, and the file with the job."""
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.update(_ENVIRONMENT)  # on a further host nobody else has
    events, job_file = sys.argv[1:]
    if events.startswith("parent:"):
        die_with_parent()  # a launcher that is killed must leave no second writer behind
    pipe = _PipeReporter(_open_events(events))
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    first = os.environ.get("RANK", "0") == "0"
    if job["stage"] not in _USES_SCIKIT_LEARN:
        sys.modules["sklearn"] = None  # type: ignore[assignment]  # as Python has it: there is no such module
    try:
        from toolchain.pipeline import stage_called

        stage = stage_called(job["stage"])
        metrics = stage.run_job(job["settings"], {name: Path(path) for name, path in job["inputs"].items()},
                                Path(job["out"]), pipe if first else Silent())  # fmt: skip
        if first:
            pipe.send({"result": metrics})
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1  # the parent has gone; nobody is left to tell
    except Exception as error:  # noqa: BLE001 - the border of the process: whatever it was is told to the parent
        traceback.print_exc()
        pipe.send(explain(error, job["stage"]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
