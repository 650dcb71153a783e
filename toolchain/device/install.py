"""Put a bundle in service: staged, flushed, swapped in, tried, and kept when good; else the one before serves on."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import files, place, serve, signature, smoke, supervise, tuned, unpack, verify
from .client import Client
from .errors import BusyError, DeviceError, RolledBackError, UsageError
from .releases import Home, Settings, State, release_name
from .service import Service

_POLL_S = 0.05
_MARGIN_S = 20.0
"""For the old server to stop and the new edgectl to start."""
Say = Callable[[str], None]


def install(
    source: Path,
    service: Service,
    *,
    required: signature.Policy | None,
    changes: dict[str, Any],
    say: Say,
) -> dict[str, Any]:
    """Install the bundle in `source`, a folder or an archive; `changes` are Settings that the last release had not.

    Raises RolledBackError when it was tried and found wanting, DeviceError when it did not come that far.
    """
    home = service.home
    with home.locked("install"), _disk_errors(home):
        service.check_reachable()
        _recover(home, say)
        release = _stage(source, home, required, say)
        bundle = files.open_bundle(home.folder(release))
        bad = [f"{item['name']}: {item['detail']}" for item in verify.host_checks(bundle) if not item["ok"]]
        if bad:
            _discard(home, release)
            raise DeviceError(
                f"{release} cannot run here: {'; '.join(bad)}", hint="build it for this device (docs/targets.md)"
            )
        before = home.state()
        base = home.settings(before.good) if before.good is not None else home.settings(release)
        settings = replace(base, **changes)
        if serve.KEY_VARIABLE in os.environ and settings.api_key_file is None:
            say(f"{serve.KEY_VARIABLE} is not used by an installation: --api-key-file F gives it keys")
        _check_settings(settings, home, service)
        return _activate(service, release, settings, say)


def rollback(service: Service, *, say: Say) -> dict[str, Any]:
    """Serve the release that was good before the good one. Raises RolledBackError, DeviceError."""
    home = service.home
    if not home.releases.is_dir():
        raise _nothing_there(home)
    with home.locked("rollback"), _disk_errors(home):
        interrupted = _recover(home, say)
        previous = home.state().previous
        if interrupted is not None:
            say(f"the trial of {interrupted} was broken off: {home.state().good or 'nothing'} is served")
        if previous is None or not home.folder(previous).is_dir():
            raise DeviceError("there is no release to go back to", hint="edgectl status lists the releases")
        return _activate(service, previous, home.settings(previous), say)


def gc(home: Home, *, say: Say) -> list[str]:
    """Remove releases that are neither served nor needed for a rollback; which ones."""
    if not home.releases.is_dir():
        raise _nothing_there(home)
    with home.locked("gc"), _disk_errors(home):
        _recover(home, say)
        doomed = home.unneeded()
        for release in doomed:
            home.remove(release)
        return doomed


def uninstall(service: Service, *, say: Say) -> list[str]:
    """Stop the service and remove the releases and what is kept of them: which ones. What is not ours stays."""
    home = service.home
    # Whoever was killed on the way leaves the lock's file to the end.
    ours = (home.releases, service.unit, home.root / tuned.FOLDER, home.root / "lock")
    if not any(path.exists() for path in ours):
        raise _nothing_there(home)
    with home.locked("uninstall"), _disk_errors(home):
        releases = home.names()
        say("stopping the service")
        service.stop(remove=True)
        home.remove_all()
    (home.root / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something of the user's own is in it
        home.root.rmdir()
    return releases


def status(service: Service) -> dict[str, Any]:
    """What is installed, what is served, and whether it answers."""
    home = service.home
    state, release = home.state(), home.to_serve()
    settings = home.settings(release) if release is not None else Settings()
    note = supervise.read_note(service.note)
    silent = "no release is to be served" if release is None else _silence(home, release, settings)
    found: dict[str, Any] = {
        "schema_version": 1,
        "home": str(home.root),
        "service": service.kind,
        "service_runs": service.runs(),
        "current": home.current(),
        "good": state.good,
        "previous": state.previous,
        "served": release,
        "on_trial": home.on_trial(),
        "address": f"{settings.host}:{settings.port}",
        "answers": silent is None,
        "why_not": silent,
        "last_failure": state.failed,
        "stand_in": _stand_in(home, note),
        "supervisor": {key: note.get(key) for key in ("release", "state", "ended")},
        "releases": home.names(),
    }
    return found


def _stand_in(home: Home, note: dict[str, Any]) -> dict[str, Any] | None:
    """Who serves instead of the good release, whether it answers, what is wrong with that one, and what helps."""
    release, good = note.get("release"), note.get("instead_of")
    if release is None or good is None or good != home.to_serve():
        return None
    try:
        wrong = next(iter(files.problems(files.open_bundle(home.folder(good)))), None)
    except DeviceError as error:
        wrong = error.message
    again = "install it again from a whole copy" if wrong else f"it is whole: {home.folder(good)}/edgectl install"
    return {
        "release": release,
        "answers": _silence(home, release, home.settings(release)) is None,
        "wrong": wrong,
        "remedy": f"{again}; or edgectl rollback, to keep {release}",
    }


def _recover(home: Home, say: Say) -> str | None:
    interrupted = home.recover()
    if interrupted is not None:
        say(f"an earlier trial, of {interrupted}, was broken off and is undone")
    return interrupted


def _stage(source: Path, home: Home, required: signature.Policy | None, say: Say) -> str:
    """The bundle among the releases, every byte compared and flushed; its name."""
    if source.is_file():
        folder = _unpacked(source, home, required, say)
        return folder.name
    verdict = verify.signature_check(source, required)
    if not verdict["ok"]:
        raise DeviceError(f"signature: {verdict['detail']}", hint="do not use it, unless you know why that is so")
    bundle = files.open_bundle(source)
    found = files.problems(bundle, read=False)
    if found:
        raise DeviceError(f"{source} is not as it was built: {'; '.join(found)}", hint="copy the bundle again")
    release = release_name(bundle.manifest)
    if source.resolve() == home.folder(release).resolve():
        if damaged := files.problems(bundle):
            raise DeviceError(f"{release} is damaged: {damaged[0]}", hint="install it from a whole copy")
        return release
    if _is_whole(home, release, say):
        return release
    place.check_room(home.releases, bundle.manifest)
    say(f"copying {len(bundle.manifest['files'])} files")
    with place.new_folder(home.folder(release)) as staged:
        for name in (files.MANIFEST, files.SUMS, files.SIGNATURE):
            if (source / name).exists():
                place.write(staged / name, 0o644, _blocks(source / name))
        for name, facts in bundle.manifest["files"].items():
            place.write(staged / name, int(facts["mode"], 8), _blocks(source / name, facts["sha256"]))
    return release


def _unpacked(archive: Path, home: Home, required: signature.Policy | None, say: Say) -> Path:
    named: list[str] = []

    def name(manifest: dict[str, Any]) -> str:
        named.append(release_name(manifest))
        if _is_whole(home, named[0], say):
            raise _ThereError
        return named[0]

    try:
        return unpack.run(archive, home.releases, required=required, say=say, name=name)
    except _ThereError:
        return home.folder(named[0])


class _ThereError(Exception):
    """The release is staged already."""


def _is_whole(home: Home, release: str, say: Say) -> bool:
    """Whether the release is staged already, and as it was built; a damaged one is removed."""
    folder = home.folder(release)
    if not folder.is_dir():
        return False
    try:
        found = files.problems(files.open_bundle(folder))
    except DeviceError as error:
        found = [error.message]
    if not found:
        say(f"{release} is there already")
        return True
    say(f"{release} is there and damaged ({found[0]}): it is copied anew")
    home.remove_files(release)
    return False


def _blocks(path: Path, sha256: str | None = None) -> Iterator[bytes]:
    """A file's bytes. Raises DeviceError at the end when they are not those that were built."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            yield block
    if sha256 is not None and digest.hexdigest() != sha256:
        raise DeviceError(f"{path}: changed: SHA-256 differs", hint="copy the bundle again")


def _check_settings(settings: Settings, home: Home, service: Service) -> None:
    """The address can be had, or our own server has its port; there are keys. Raises UsageError, DeviceError."""
    key_file = Path(settings.api_key_file) if settings.api_key_file is not None else None
    if key_file is not None:
        if not key_file.is_absolute():
            raise UsageError(f"--api-key-file {key_file}: a service needs its whole path")
        serve.read_keys(key_file)
    try:
        serve.check_address(settings.host, settings.port, has_key=key_file is not None)
    except UsageError as error:
        # The check speaks for `serve`, which a variable can give the key.
        raise UsageError(error.message, hint=error.hint and "add --api-key-file F, or leave --host out") from None
    except BusyError as error:
        served = home.to_serve()
        if served is None or not service.runs() or home.settings(served).port != settings.port:
            free = serve.free_port(settings.host)
            raise BusyError(error.message, hint=f"port {free} is free: ./edgectl install --port {free}") from None


def _activate(service: Service, release: str, settings: Settings, say: Say) -> dict[str, Any]:
    """Swap, start, try, and keep or go back. Only for the holder of the lock."""
    home, before = service.home, service.home.state()
    again = release == before.good
    # Of a release that may be served again without this trial, its own address and key stay until it is over.
    home.write_settings(release, settings, trial=release in (before.good, before.previous))
    try:
        if home.supervisor() is None:
            home.point("service", release)
        # Before the swap: the supervisor follows that at once, and would then be started anew over what it has begun.
        anew = service.prepare(release)
        # What stands in for a good release does so until the supervisor starts anew.
        anew = anew or supervise.read_note(service.note).get("instead_of") is not None
        home.point("current", release)
        report = _try(service, release, settings, say, anew=anew)
    except BaseException as error:
        home.drop_trial_settings()
        _fall_back(service, before, release, error, say)
        raise  # not reached for a DeviceError
    home.keep_settings(release)
    home.write_state(State(good=release, previous=before.previous if again else before.good, failed=before.failed))
    home.point("service", release)
    say(f"{release} is good")
    return _record(release, serves=release, previous=home.state().previous, smoke=report)


def _record(
    release: str,
    *,
    serves: str | None,
    previous: str | None,
    reason: str | None = None,
    smoke: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What became of a release: `reason` why it was not kept, `smoke` what its trial found, as far as it came."""
    return {
        "schema_version": 1,
        "release": release,
        "good": reason is None,
        "reason": reason,
        "serves": serves,
        "previous": previous,
        "smoke": smoke,
    }


class _TrialError(DeviceError):
    """The release answers, and fails checks."""

    def __init__(self, report: dict[str, Any]) -> None:
        failed = [f"{item['name']}: {item['detail']}" for item in report["checks"] if not item["ok"]]
        super().__init__(f"{len(failed)} of {len(report['checks'])} checks failed: {'; '.join(failed)}")
        self.report = report


def _try(service: Service, release: str, settings: Settings, say: Say, *, anew: bool) -> dict[str, Any]:
    """The release serves, and does what it did where it was built. Raises DeviceError."""
    home = service.home
    bundle = files.open_bundle(home.folder(release))
    say(f"starting {release}")
    service.start(anew=anew)
    _wait_served(service, release, settings, serve.ready_timeout_s(bundle) + _MARGIN_S)
    say("it answers; trying it")
    report = smoke.live(bundle, _client(settings), say)
    place.replace_json(home.smoke_record(release), report)
    if not report["ok"]:
        raise _TrialError(report)
    return report


def _wait_served(service: Service, release: str, settings: Settings, limit_s: float) -> None:
    """Until the release's edgectl is ready, its model's bytes read, and the server answers at its address.

    Raises DeviceError when that edgectl has ended, or it is late.
    """
    end_s = time.monotonic() + limit_s
    while True:
        note = supervise.read_note(service.note)
        # An older release's supervisor does not say with which settings.
        ours = note.get("release") == release and note.get("settings") in (None, asdict(settings))
        state = note.get("state") if ours else None
        if state == "ready" and _silence(service.home, release, settings) is None:
            return
        if state == "ended":
            raise DeviceError(str(note.get("ended")))
        if note.get("instead_of") == release:
            raise DeviceError(f"it does not start; {note.get('release')}, which was good before it, is served instead")
        if time.monotonic() > end_s:
            raise DeviceError(f"it did not answer within {limit_s:.0f} s")
        time.sleep(_POLL_S)


def _silence(home: Home, release: str, settings: Settings) -> str | None:
    """Why it is not this release's model that answers at the address; None when it is."""
    try:
        client = _client(settings, timeout_s=10)
        status, _ = client.request("GET", "/health", with_key=False)
        if status != 200:
            return f"/health is {status}"
        status, props = client.request("GET", "/props")
    except OSError as error:
        return str(error)
    except DeviceError as error:
        return error.message
    if status != 200 or not isinstance(props, dict):
        return f"/props is {status}"
    path = str(props.get("model_path"))
    return None if Path(path).is_relative_to(home.folder(release)) else f"another server answers, with {path}"


def _client(settings: Settings, timeout_s: float = 600.0) -> Client:
    keys = serve.read_keys(Path(settings.api_key_file)) if settings.api_key_file is not None else []
    return Client(serve.local_address(settings.host), settings.port, keys[0] if keys else None, timeout_s=timeout_s)


def _fall_back(service: Service, before: State, release: str, error: BaseException, say: Say) -> None:
    """What served before serves again. Raises RolledBackError for a release that was not good."""
    home = service.home
    reason = error.message if isinstance(error, DeviceError) else "it was interrupted"
    if isinstance(error, OSError):
        reason = f"{error.filename or home.root}: {error.strerror}"
    say(f"{release} is not kept: {reason}")
    failed = {
        "release": release,
        "reason": reason[:2000],
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    back = None
    if before.good is not None:
        anew = service.prepare(before.good)
        home.point("current", before.good)
        service.start(anew=anew)
        back = before.good
    else:
        service.stop(remove=True)
        for link in ("current", "service"):
            (home.root / link).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a full disk is no reason not to go back
        home.write_state(replace(before, failed=failed))
    if back is not None:
        bundle = files.open_bundle(home.folder(back))
        _wait_served(service, back, home.settings(back), serve.ready_timeout_s(bundle) + _MARGIN_S)
        say(f"{back} serves again")
    if isinstance(error, DeviceError):
        raise RolledBackError(
            f"{release} was not good: {error.message}",
            hint=f"{back} serves again" if back else "no release is served; edgectl status",
            record=_record(
                release,
                serves=back,
                previous=before.previous,
                reason=error.message,
                smoke=error.report if isinstance(error, _TrialError) else None,
            ),
        ) from None


def _nothing_there(home: Home) -> DeviceError:
    return DeviceError(f"{home.root}: nothing is installed there", hint="--home names another folder")


def _discard(home: Home, release: str) -> None:
    if release in home.unneeded():
        home.remove(release)


@contextlib.contextmanager
def _disk_errors(home: Home) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = error.filename if error.filename is not None else home.root
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space, then try again" if full else "nothing was changed that edgectl status does not show"
        raise DeviceError(f"{name}: {os.strerror(error.errno or 0)}", hint=hint) from error
