"""The one door to external programs: output to a log, the last line in the error, no orphan when we die."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from toolchain.errors import ExternalToolError, HostError

_PR_SET_PDEATHSIG = 1
_TERM_GRACE_S = 5.0
DISK_FULL = "No space left on device"
"""As every program says it, in the C locale."""


def die_with_parent() -> None:
    """In a child before exec: ask Linux to kill it when its parent dies, so that a kill −9 leaves no second writer."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(
    argv: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    on_line: Callable[[str], None] | None = None,
    stdout: Path | None = None,
    hint: str | None = None,
    group: "Group | None" = None,
    elsewhere: bool = False,
    pass_fds: Sequence[int] = (),
) -> None:
    """Run a program to its end; stdout and stderr together go to `log`, line by line to `on_line`.

    It has this process's environment and `env`, and of them no variable of `without`. With `stdout`, what the program
    prints there goes to that file, and only stderr to the log. With `group`, another thread can end it. It inherits
    `pass_fds`, under their numbers. Raises ExternalToolError when it is missing, fails or is killed, and HostError when
    it fails and told of a full disk; of a program that works `elsewhere`, that disk is not ours.
    """
    name = Path(argv[0]).name
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ""
    disk_full = False
    with (
        log.open("a", encoding="utf-8") as out,
        stdout.open("wb") if stdout is not None else nullcontext() as result,
    ):
        out.write(f"$ {shlex.join(argv)}\n")
        out.flush()
        try:
            child = subprocess.Popen(
                argv,
                cwd=cwd,
                env={name: value for name, value in {**os.environ, **(env or {})}.items() if name not in without},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if result is None else result,
                stderr=subprocess.STDOUT if result is None else subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=pass_fds,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, no locks taken
            )
        except OSError as error:
            raise ExternalToolError(f"cannot start {argv[0]}: {error.strerror}", hint=hint) from error
        try:
            if group is not None:
                group.add(child)
            lines = child.stdout if result is None else child.stderr
            assert lines is not None
            for line in lines:
                out.write(line)
                if line.strip():
                    last = line.strip()
                    disk_full = disk_full or (DISK_FULL in line and not elsewhere)
                if on_line is not None:
                    on_line(line.rstrip("\n"))
            code = child.wait()
        except BaseException:
            stop(child)
            raise
        finally:
            if group is not None:
                group.remove(child)
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
    if disk_full and code != 0:
        hint = f"free some space, then run again; full output: {log}"
        raise HostError(f"{name}: no space left on the disk", hint=hint)
    if code < 0:
        name_of_signal = signal.Signals(-code).name
        more = " (often: out of memory)" if -code == signal.SIGKILL else ""
        message = f"{name} was killed by {name_of_signal}{more}"
        raise ExternalToolError(message, hint=hint or f"full output: {log}", returned=code)
    if code > 0:
        message = f"{name} exited with {code}: {last[:400]}"
        raise ExternalToolError(message, hint=hint or f"full output: {log}", returned=code)


def stop(child: "subprocess.Popen[str]") -> None:
    """Ask a child to end, then make it end."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_TERM_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Group:
    """Programs that run in several threads, all of which one thread can end; none starts after that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def add(self, child: "subprocess.Popen[str]") -> None:
        with self._lock:
            self._running.add(child)
            if self.stopped:
                child.terminate()

    def remove(self, child: "subprocess.Popen[str]") -> None:
        with self._lock:
            self._running.discard(child)

    def stop(self) -> None:
        """End all of them: first every one is asked, then made to."""
        with self._lock:
            self.stopped = True
            running = list(self._running)
            for child in running:
                child.terminate()
        for child in running:
            stop(child)
