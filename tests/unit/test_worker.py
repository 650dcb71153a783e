"""A stage in a process of its own: events, errors, kills."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from toolchain import worker
from toolchain.errors import ArtifactError, DataError, HostError, ModelError
from toolchain.reporter import Silent, Task


class _Recorder(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.labels: list[str] = []

    def start(self, label: str, *, total: float | None, unit: str) -> Task:
        self.labels.append(label)
        return super().start(label, total=total, unit=unit)

    def line(self, text: str) -> None:
        self.lines.append(text)


def job(stage: str, inputs: dict[str, Path], out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "settings": settings,
        "inputs": {name: str(path) for name, path in inputs.items()},
        "out": str(out),
    }


def teacher_job(model: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    return job("teacher", {"model": model}, out, {"model": ".", "sha256": None, "special_tokens": {}})


def test_an_error_of_ours_crosses_the_border_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        worker.run_in_worker(
            teacher_job(tmp_path / "model", tmp_path / "out"), log=tmp_path / "log", report=_Recorder()
        )


def test_an_error_that_nobody_foresaw_is_called_a_bug_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(worker.StageCrashError, match="KeyError") as caught:
        worker.run_in_worker(
            job("teacher", {}, tmp_path, {"model": ".", "special_tokens": {}}),
            log=tmp_path / "log",
            report=_Recorder(),
        )
    assert str(tmp_path / "log") in str(caught.value.hint)
    assert "Traceback" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (DataError("row 3", hint="mend it"), "DataError", "row 3"),
        (OSError(errno.ENOSPC, "No space left on device"), "HostError", "no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "HostError", "no space left"),
        (MemoryError("2 GiB"), "HostError", "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "HostError", "out of GPU memory"),
        (ModuleNotFoundError("no", name="peft"), "HostError", "needs the package 'peft'"),
        (ValueError("x"), "bug", "ValueError: x"),
    ],
)
def test_failures_of_the_machine_are_told_from_bugs(error: Exception, kind: str, says: str) -> None:
    event = worker.explain(error, "merge")
    assert event["error"] == kind
    assert says in event["message"]
    assert (event["hint"] is None) == (kind == "bug")


def test_a_killed_stage_is_said_to_be_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(_script(tmp_path, "kill -9 $$")))
    with pytest.raises(HostError, match="killed: most likely the machine ran out of memory"):
        worker.run_in_worker(job("distill", {}, tmp_path, {}), log=tmp_path / "log", report=_Recorder())


def test_a_stage_that_ends_without_a_word_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(_script(tmp_path, "cat > /dev/null; exit 7")))
    with pytest.raises(HostError, match="ended with status 7"):
        worker.run_in_worker(job("distill", {}, tmp_path, {}), log=tmp_path / "log", report=_Recorder())


def test_progress_and_the_result_come_through_the_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        '{"start": 1, "label": "rows", "total": 3, "unit": "row"}',
        '{"advance": 1, "amount": 3.0}',
        '{"line": "loss 1.5"}',
        '{"finish": 1}',
        '{"result": {"loss": 1.5}}',
    ]
    script = "cat > /dev/null; " + "; ".join(f"echo '{event}' >&$3" for event in events)
    monkeypatch.setattr(sys, "executable", str(_script(tmp_path, script)))
    recorder = _Recorder()
    metrics = worker.run_in_worker(job("distill", {}, tmp_path, {}), log=tmp_path / "log", report=recorder)
    assert metrics == {"loss": 1.5}
    assert recorder.labels == ["rows"]
    assert recorder.lines == ["loss 1.5"]


def _script(folder: Path, body: str) -> Path:
    """A stand-in for the interpreter: its third argument is the descriptor for events."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n{body.replace('>&$3', '>/proc/self/fd/$3')}\n")
    path.chmod(0o755)
    return path


def test_an_unknown_kind_of_artifact_error_keeps_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = '{"error": "ArtifactError", "message": "gone", "hint": "again"}'
    monkeypatch.setattr(sys, "executable", str(_script(tmp_path, f"cat > /dev/null; echo '{event}' >&$3; exit 1")))
    with pytest.raises(ArtifactError, match="gone") as caught:
        worker.run_in_worker(job("distill", {}, tmp_path, {}), log=tmp_path / "log", report=_Recorder())
    assert caught.value.hint == "again"


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    """Two writers in one partial directory are what a kill −9 must not leave behind."""
    script = _script(tmp_path, f"echo $$ > {tmp_path}/pid; cat > /dev/null; sleep 60")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from toolchain import worker; from toolchain.reporter import Silent;"
            f"sys.executable = {str(script)!r};"
            "worker.run_in_worker({'stage': 'distill'}, log=Path(sys.argv[1]), report=Silent())",
            str(tmp_path / "log"),
        ]
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _alive(child):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
