"""Where releases lie on a device, which one is good and which one is to be served. All of it is files and links.

    HOME/
      releases/<name>-<version>-<target>-<12 hex of the bundle's id>/     a bundle, whole
      current → releases/…      what is to be served; another one than the good one is on trial
      service → releases/…      whose edgectl looks after the server
      state.json                which release was found good, and which one before it
      settings/<release>.json   address and key of the server; <release>.trial.json: those that are being tried
      records/                  what smoke and bench found
      tuned/                    what tune found, by bundle and machine: see tuned.py
      lock                      held by whoever changes anything

A release is on trial while `current` is not the good one, and another address or key while that file is there. A trial
belongs to the process that holds the lock: when that has died, the good release is served again, as it was before, and
nothing needs to have been written for it.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import files, launch, place, tuned
from .errors import BusyError, DeviceError

SCHEMA_VERSION = 1
_LOCK_WAIT_S = 10.0
_TRIAL = ".trial.json"
_RELEASE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*-[0-9a-f]{12}", re.ASCII)

SYSTEM_HOME = Path(launch.SYSTEM_HOME)


def default_home() -> Path:
    """Where releases lie when no other folder is given."""
    return Path(launch.default_home())


def release_name(manifest: dict[str, Any]) -> str:
    """What a bundle is called among the releases: two bundles never share it."""
    return f"{files.folder_name(manifest)}-{str(manifest['bundle_id']).removeprefix('sha256:')[:12]}"


@dataclass(frozen=True)
class State:
    """What survives of installations."""

    good: str | None = None
    previous: str | None = None
    failed: dict[str, str] | None = None
    """The last release that was not good: "release", "reason", "utc"."""


@dataclass(frozen=True)
class Settings:
    """How a release is served."""

    host: str = launch.Options.host
    port: int = launch.Options.port
    api_key_file: str | None = None


@dataclass(frozen=True)
class Home:
    """The folder of everything."""

    root: Path

    @property
    def releases(self) -> Path:
        return self.root / "releases"

    @property
    def service(self) -> Path:
        return self.root / "service"

    @property
    def records(self) -> Path:
        return self.root / "records"

    def folder(self, release: str) -> Path:
        return self.releases / release

    def smoke_record(self, release: str) -> Path:
        """What its trial found."""
        return self.records / f"{release}.smoke.json"

    def names(self) -> list[str]:
        """Releases that are there, whole: half ones have other names."""
        if not self.releases.is_dir():
            return []
        return sorted(path.name for path in self.releases.iterdir() if _RELEASE.fullmatch(path.name) and path.is_dir())

    def current(self) -> str | None:
        return self._leads_to(self.root / "current")

    def supervisor(self) -> str | None:
        """The release whose edgectl is the service."""
        return self._leads_to(self.service)

    def point(self, link: str, release: str) -> None:
        place.point(self.root / link, f"releases/{release}")

    def _leads_to(self, link: Path) -> str | None:
        try:
            release = link.readlink().name
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DeviceError(f"{link} is no link: {error.strerror}", hint="remove it, then install again") from None
        return release if self.folder(release).is_dir() else None

    def state(self) -> State:
        """Raises DeviceError for a state.json that is damaged."""
        content = _read_object(self.root / "state.json")
        if content is None:
            return State()
        if content.pop("schema_version", None) != SCHEMA_VERSION:
            raise DeviceError(
                f"{self.root / 'state.json'} was written by another edgectl", hint="use the newest release's edgectl"
            )
        try:
            state = State(**content)
        except TypeError:
            state = None
        if state is None or not (
            all(name is None or isinstance(name, str) for name in (state.good, state.previous))
            and (state.failed is None or isinstance(state.failed, dict))
        ):
            raise DeviceError(f"{self.root / 'state.json'} is damaged", hint="remove it, then install again")
        return state

    def write_state(self, state: State) -> None:
        place.replace_json(self.root / "state.json", {"schema_version": SCHEMA_VERSION, **asdict(state)})

    def settings(self, release: str) -> Settings:
        """Those that are being tried while somebody is at it, else those that are kept. Raises DeviceError."""
        path = self._settings(release, trial=True)
        tried = _read_settings(path) if path.exists() and self.is_locked() else None
        return tried if tried is not None else self.kept_settings(release)

    def kept_settings(self, release: str) -> Settings:
        """Raises DeviceError."""
        return _read_settings(self._settings(release)) or Settings()

    def write_settings(self, release: str, settings: Settings, *, trial: bool) -> None:
        """`trial`: they are kept only by `keep_settings`."""
        place.replace_json(self._settings(release, trial=trial), asdict(settings))

    def keep_settings(self, release: str) -> None:
        """What was tried, if anything was, is what is kept from now on."""
        with contextlib.suppress(FileNotFoundError):
            self._settings(release, trial=True).rename(self._settings(release))
            place.sync(self.root / "settings")

    def drop_trial_settings(self) -> str | None:
        """The release that was tried with other settings, if any."""
        dropped = None
        for path in (self.root / "settings").glob(f"*{_TRIAL}"):
            path.unlink()
            dropped = path.name.removesuffix(_TRIAL)
        return dropped

    def on_trial(self) -> bool:
        """Whether somebody tries a release, or other settings of one."""
        current = self.current()
        tried = current is not None and self._settings(current, trial=True).exists()
        return (tried or current != self.state().good) and self.is_locked()

    def _settings(self, release: str, *, trial: bool = False) -> Path:
        return self.root / "settings" / f"{release}{_TRIAL if trial else '.json'}"

    def to_serve(self) -> str | None:
        """The release that is to be served now: the current one, or the good one when a trial was left alone.

        The one before it while the good one is copied anew.
        """
        # Of what is damaged whoever changes anything is told; the device goes on with what it has.
        current = None
        with contextlib.suppress(DeviceError):
            current = self.current()
        try:
            state = self.state()
        except DeviceError:
            state = State(current)
        if current is None or (current != state.good and not self.is_locked()):
            current = state.good
        there = (name for name in (current, state.previous) if name is not None and self.folder(name).is_dir())
        return next(there, None)

    def stand_in(self, release: str) -> str | None:
        """Who serves when a good release does not start, such as one whose files are damaged: the one before it."""
        try:
            state = self.state()
        except DeviceError:
            return None
        previous = state.previous
        return previous if release == state.good and previous is not None and self.folder(previous).is_dir() else None

    def make(self) -> None:
        """Make the folder, for everyone to read: the service runs as another user. Raises DeviceError."""
        try:
            for folder in (self.root, self.releases, self.records, self.root / "settings"):
                if not folder.is_dir():
                    folder.mkdir(parents=True)
                    folder.chmod(0o755)  # whatever the umask is; a folder of the user's own stays as it is
        except OSError as error:
            raise DeviceError(f"{error.filename}: {error.strerror}", hint=_what_helps(error)) from None

    @contextlib.contextmanager
    def locked(self, verb: str) -> Iterator[None]:
        """Alone with the folder, which is made where it is not there. Raises DeviceError.

        BusyError when another process keeps it for more than ten seconds.
        """
        self.make()
        path = self.root / "lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DeviceError(f"{path}: {error.strerror}", hint=_what_helps(error)) from None
        try:
            with contextlib.suppress(PermissionError):  # another user's, who has let us write
                os.fchmod(handle, 0o644)  # the service looks at it, whatever the umask was
            end_s = time.monotonic() + _LOCK_WAIT_S
            while not _try_lock(handle, fcntl.LOCK_EX):
                if time.monotonic() > end_s:
                    holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                    raise BusyError(f"{self.root} is in use: {holder}", hint="wait for it, then try again")
                time.sleep(0.1)
            os.ftruncate(handle, 0)
            with contextlib.suppress(OSError):  # only a text: on a full disk gc and uninstall are what helps
                os.pwrite(handle, f"edgectl {verb}, process {os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def is_locked(self) -> bool:
        """Whether somebody is at work here. Needs no right to write."""
        try:
            handle = os.open(self.root / "lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(handle, fcntl.LOCK_SH)
        finally:
            os.close(handle)

    def recover(self) -> str | None:
        """For the holder of the lock: undo what a killed one left. The release whose trial was broken off, if any."""
        for path in place.leftovers(self.releases):
            shutil.rmtree(path)
        for folder in (self.root / "settings", self.records):
            for path in folder.glob(place.draft(folder / "*").name):
                path.unlink()
        retried = self.drop_trial_settings()
        state, current = self.state(), self.current()
        if current is None or current == state.good:
            return retried
        if state.good is None:
            (self.root / "current").unlink()
        else:
            self.point("current", state.good)
        return current

    def unneeded(self) -> list[str]:
        """Releases that nothing leads to any more."""
        state = self.state()
        kept = {state.good, state.previous, self.current(), self.supervisor()}
        return [name for name in self.names() if name not in kept]

    def remove_files(self, release: str) -> None:
        """A release, to be copied anew. Half removed, it has a name that is no release's."""
        doomed = self.releases / f".{release}.unpacking"
        self.folder(release).rename(doomed)
        shutil.rmtree(doomed)

    def remove(self, release: str) -> None:
        """A release, and what is kept beside it first: whoever is killed on the way leaves a release to remove."""
        for trial in (False, True):
            self._settings(release, trial=trial).unlink(missing_ok=True)
        self.smoke_record(release).unlink(missing_ok=True)
        for path in (self.root / tuned.FOLDER).glob(f"{release[-12:]}-*.json"):
            path.unlink()
        self.remove_files(release)

    def remove_all(self) -> None:
        """Everything of ours but the lock. First what leads to a release: half removed, none is one to be served."""
        for name in ("current", "service", "state.json", "status.json", "service.log"):
            (self.root / name).unlink(missing_ok=True)
            place.draft(self.root / name).unlink(missing_ok=True)
        for folder in (self.root / "settings", self.records, self.root / tuned.FOLDER, self.releases):
            if folder.is_dir():
                shutil.rmtree(folder)


def _what_helps(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, then try again"
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return "remove what is there in its place, or give another folder: --home DIR"
    return "run as root, or give a folder of yours: --home DIR"


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_object(path: Path) -> dict[str, Any] | None:
    content = files.read_small(path, files.JSON_LIMIT_BYTES)
    if content is None:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DeviceError(f"{path} is damaged", hint="remove it, then install again")
    return found


def _read_settings(path: Path) -> Settings | None:
    content = _read_object(path)
    if content is None:
        return None
    try:
        settings = Settings(**content)
    except TypeError:
        settings = None
    if settings is None or not (
        isinstance(settings.host, str)
        and type(settings.port) is int
        and (settings.api_key_file is None or isinstance(settings.api_key_file, str))
    ):
        raise DeviceError(
            f"{path} is damaged",
            hint="remove it, then install again, with the --host, --port and --api-key-file wanted",
        )
    return settings
