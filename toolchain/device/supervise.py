"""The service: serve the release that is to be served, follow it when that changes, start again what has ended.

Writes nothing but a note of what it does, so it can run as a user without rights. What it runs is the release's own
edgectl, as a child: a release that is broken cannot break what leads back to the good one.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import place
from .errors import BusyError, DeviceError
from .launch import HOME_VARIABLE, KEY_VARIABLE, die_with_parent
from .releases import Home, Settings
from .serve import Restarts

_POLL_S = 0.1
_STOP_GRACE_S = 15.0
_LOCK_WAIT_S = 1.0
"""Whoever asks whether there is a supervisor holds its lock for a moment."""
_FAILURES = 2
"""So often in a row a good release may fail to start before the one before it stands in."""
_LOG_BYTES = 16 << 20


def note_path(home: Home, runtime: str | None) -> Path:
    """Where the supervisor notes what it does: in systemd's RuntimeDirectory, or in the home itself."""
    return Path(runtime, "status.json") if runtime else home.root / "status.json"


def read_note(path: Path) -> dict[str, Any]:
    """The note; empty when there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def run(home: Home, say: Callable[[str], None]) -> None:
    """Until a signal ends it, which `cli` raises as an exception. Raises BusyError when there is one already."""
    handle = os.open(home.root, os.O_RDONLY | os.O_DIRECTORY)
    end_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end_s:
                raise BusyError(f"{home.root} has a service that runs already", hint="edgectl status") from None
            time.sleep(0.01)
    note = note_path(home, os.environ.get("RUNTIME_DIRECTORY"))
    last: _Wanted | None = None
    restarts, failures = Restarts(), 0
    while True:
        wanted = _wanted(home)
        if wanted is None:
            _write_note(note, state="idle", ended="no release has been found good")
            say("no release is to be served: waiting for an installation")
            while _wanted(home) is None:
                time.sleep(_POLL_S)
            continue
        if wanted != last:
            restarts, last, failures = Restarts(), wanted, 0
        stand_in = home.stand_in(wanted.release) if failures >= _FAILURES else None
        if stand_in is not None:
            say(f"{wanted.release} does not start; {stand_in}, which was good before it, is served instead")
        start_s = time.monotonic()
        ended = _serve(home, stand_in or wanted.release, wanted, note, say)
        if ended is None:
            continue
        if stand_in is None and ended.code != BusyError.exit_code:
            failures = 0 if ended.was_ready else failures + 1
        wait_s = restarts.after(time.monotonic() - start_s) or Restarts.LONGEST_S
        say(f"{stand_in or wanted.release}: {ended.reason}; started again in {wait_s:g} s")
        end_s = time.monotonic() + wait_s
        while time.monotonic() < end_s and not _is_other(home, wanted):
            time.sleep(_POLL_S)


@dataclass(frozen=True)
class _Wanted:
    """What is to be served."""

    release: str
    settings: Settings | None
    """None where they are damaged: what is served goes on, and does not start anew."""


def _wanted(home: Home) -> _Wanted | None:
    release = home.to_serve()
    if release is None:
        return None
    try:
        return _Wanted(release, home.settings(release))
    except DeviceError:
        return _Wanted(release, None)


def _is_other(home: Home, wanted: _Wanted) -> bool:
    """Whether something else than `wanted` is to be served by now."""
    now = _wanted(home)
    return now is None or now.release != wanted.release or now.settings not in (None, wanted.settings)


@dataclass(frozen=True)
class _Ended:
    """A release's edgectl, which ended by itself."""

    code: int
    reason: str
    was_ready: bool = False
    """It had started: what ends later, for want of memory or by a signal, starts again."""


def _serve(home: Home, release: str, wanted: _Wanted, note: Path, say: Callable[[str], None]) -> _Ended | None:
    """Serve `release` until something else than `wanted` is to be served (None), or its edgectl ends."""
    instead_of = wanted.release if release != wanted.release else None
    tell = functools.partial(_write_note, note, release=release, instead_of=instead_of)
    try:
        settings = home.settings(release)
    except DeviceError as error:
        tell(state="ended", ended=error.message)
        return _Ended(error.exit_code, error.message)
    tell = functools.partial(tell, settings=settings)
    tell(state="starting")
    argv = [sys.executable, *_isolated(), str(home.folder(release) / "edgectl"), "serve", *_options(release, settings)]
    # Only a file's keys are known to whoever asks the server, at the next start as well.
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    try:
        child = subprocess.Popen(
            argv,
            env={**environment, HOME_VARIABLE: str(home.root)},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, no locks taken
        )
    except OSError as error:
        tell(state="ended", ended=str(error))
        return _Ended(1, f"cannot start {argv[0]}: {error.strerror}")
    errors: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("error: "):
                errors.append(line.removeprefix("error: ").rstrip("\n"))
            if line.startswith("ready after "):
                ready.set()
                tell(state="ready")
            _keep_log_short()
            say(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while child.poll() is None:
            if _is_other(home, wanted):
                say(f"{release} makes way for another one, or for another address or key")
                return None
            time.sleep(_POLL_S)
    finally:
        _stop(child)
        reader.join(1)
    ended = (errors or [f"its edgectl ended with {child.returncode}"])[-1]
    tell(state="ended", ended=ended)
    return _Ended(child.returncode, ended, ready.is_set())


def _keep_log_short() -> None:
    """A plain process has nobody who rotates its log."""
    status = os.fstat(2)
    if stat.S_ISREG(status.st_mode) and status.st_size > _LOG_BYTES:
        os.ftruncate(2, 0)


def _isolated() -> list[str]:
    """Python without packages and without the user's settings, as the bundle was tested."""
    return ["-I", "-S"]


def credential(release: str, key_file: str) -> str:
    """What the unit calls the key file of a release's other settings than those that it was written for."""
    return f"{release}.{hashlib.sha256(key_file.encode()).hexdigest()[:12]}"


def _options(release: str, settings: Settings) -> list[str]:
    options = ["--host", settings.host, "--port", str(settings.port)]
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    key_file = settings.api_key_file
    if key_file is not None and credentials:
        other = Path(credentials, credential(release, key_file))
        key_file = str(other if other.exists() else Path(credentials, release))  # as the unit's LoadCredential calls it
    return [*options, *(["--api-key-file", key_file] if key_file is not None else [])]


def _stop(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _write_note(
    path: Path,
    *,
    release: str | None = None,
    instead_of: str | None = None,
    settings: Settings | None = None,
    state: str,
    ended: str | None = None,
) -> None:
    note = {
        "release": release,
        "instead_of": instead_of,
        "settings": None if settings is None else asdict(settings),
        "state": state,
        "ended": ended,
        "pid": os.getpid(),
    }
    with contextlib.suppress(OSError, DeviceError):  # a full disk must not stop what is served
        place.replace_json(path, note)
