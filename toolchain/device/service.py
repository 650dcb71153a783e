"""Keep the supervisor running: a systemd unit where systemd is the init and we are root, else a plain process."""

import contextlib
import fcntl
import grp
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import files, place, supervise
from .errors import DeviceError, UsageError
from .releases import SYSTEM_HOME, Home, Settings
from .serve import KEY_VARIABLE, check_listen

UNITS = Path("/etc/systemd/system")
_SYSTEMD_RUNS = Path("/run/systemd/system")
_TARGET = "multi-user.target"
_TARGET_WANTS = f"{_TARGET}.wants"
_OWN_ADDRESSES = {"127.0.0.1", "::1", "localhost"}
_STOP_S = 30.0
KINDS = ("systemd", "process")


@dataclass(frozen=True)
class Served:
    """A release that the unit must let work."""

    release: str
    settings: Settings
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Service:
    """The supervisor of one home."""

    home: Home
    kind: str
    """One of KINDS."""

    @property
    def name(self) -> str:
        """The unit's: "edgectl" for the usual home, and of another one its path as well."""
        root = self.home.root
        if root == SYSTEM_HOME:
            return "edgectl"
        return "edgectl-" + re.sub(r"[^A-Za-z0-9]", "-", str(root).strip("/"))

    @property
    def unit(self) -> Path:
        return UNITS / f"{self.name}.service"

    @property
    def note(self) -> Path:
        """Where the supervisor says what it does."""
        return supervise.note_path(self.home, f"/run/{self.name}" if self.kind == "systemd" else None)

    def prepare(self, release: str) -> bool:
        """Let the supervisor serve `release` and what can take its place from its next start on. Raises DeviceError.

        Whether it must be started anew for that.
        """
        served = self._served(release)
        settings = served[0].settings
        check_listen(settings.host, settings.port, has_key=settings.api_key_file is not None)
        if self.kind != "systemd":
            return False
        text = unit_text(self.home, self.name, served)
        changed = not self.unit.is_file() or self.unit.read_text(encoding="utf-8") != text
        if changed:
            place.replace(self.unit, text)
            _systemctl("daemon-reload")
        _systemctl("enable", "--quiet", self.unit.name)
        for folder in (UNITS, UNITS / _TARGET_WANTS):
            place.sync(folder)
        return changed

    def start(self, *, anew: bool) -> None:
        """The supervisor runs; `anew`: another one than ran before. Raises DeviceError."""
        if self.kind == "systemd":
            _systemctl("restart" if anew else "start", self.unit.name)
            return
        if anew:
            self.stop()
            self.note.unlink(missing_ok=True)  # it tells of the one before
        if not self.runs():
            self._start_process()

    def check_reachable(self) -> None:
        """The service's user, who has no rights, can get to what it runs. Raises UsageError."""
        if self.kind != "systemd":
            return
        for path, hint in ((Path(_python()), "run it by the system's python3"), (self.home.releases, "")):
            for folder in path.parents:
                if not folder.stat().st_mode & 0o001:
                    raise UsageError(
                        f"{path}: the service's user cannot enter {folder}",
                        hint=hint or f"chmod o+x {folder}, or give another --home",
                    )

    def _served(self, release: str) -> list["Served"]:
        """`release`, and those that are served instead without anybody writing a unit for them: when a trial is left
        alone, or when the good release does not start."""
        state = self.home.state()
        first = self._facts(release)
        served = [first]
        with contextlib.suppress(DeviceError):  # damaged: it is written anew, or not come back to
            served.append(replace(first, settings=self.home.kept_settings(release)))
        for other in (state.good, state.previous):
            if other is not None and other != release:
                with contextlib.suppress(DeviceError):  # damaged: it will not be served
                    served.append(self._facts(other))
        return served

    def _facts(self, release: str) -> "Served":
        return Served(release, self.home.settings(release), files.open_bundle(self.home.folder(release)).manifest)

    def runs(self) -> bool:
        """Whether a supervisor holds the home."""
        try:
            handle = os.open(self.home.root, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # two who look are not in each other's way
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def stop(self, *, remove: bool = False) -> None:
        """End the supervisor and with it the server; `remove` takes the unit away as well. Raises DeviceError."""
        if self.kind == "systemd":
            if self.unit.is_file():
                _systemctl("disable" if remove else "stop", *(["--now", "--quiet"] if remove else []), self.unit.name)
            if remove and self.unit.is_file():
                self.unit.unlink()
                _systemctl("daemon-reload")
                with contextlib.suppress(DeviceError):  # it is known no more, unless its end was a failure
                    _systemctl("reset-failed", self.unit.name)
            return
        if not self.runs():
            return
        pids = self._supervisors()
        if not pids and self.runs():
            raise DeviceError(
                f"{self.home.root} has a service that runs, and its process is not to be seen from here",
                hint="end `edgectl supervise` where it runs, or as the user who runs it; then try again",
            )
        for pid in pids:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
            except PermissionError:
                raise DeviceError(f"the service, process {pid}, is another user's", hint="run as root") from None
        end_s = time.monotonic() + _STOP_S
        while self.runs():
            if time.monotonic() > end_s:
                shown = " ".join(map(str, pids))
                raise DeviceError(f"the service, process {shown}, does not stop", hint=f"kill -9 {shown}")
            time.sleep(0.05)

    def _supervisors(self) -> list[int]:
        """Processes that supervise this home. Its note is not asked: on a full disk it tells of one that was."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):  # it has ended, or is another user's
                argv = os.fsdecode((folder / "cmdline").read_bytes()).split("\0")
                verb = argv.index("supervise")
                home = argv[argv.index("--home", verb) + 1]
                # As the process sees it: in a container the same path is another folder.
                seen = Path(f"{folder}/{'root' if home.startswith('/') else 'cwd'}/{home}")
                if Path(argv[verb - 1]).name == "edgectl" and seen.samefile(self.home.root):
                    found.append(int(folder.name))
        return found

    def _start_process(self) -> None:
        log = self.home.root / "service.log"
        with log.open("ab") as out:
            subprocess.Popen(
                supervisor_argv(self.home),
                env={name: value for name, value in os.environ.items() if name != KEY_VARIABLE},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                start_new_session=True,
            )
        end_s = time.monotonic() + _STOP_S
        while not self.runs():
            if time.monotonic() > end_s:
                raise DeviceError(f"the service does not start: {log} says why")
            time.sleep(0.05)


def find(home: Home, kind: str | None) -> Service:
    """The service of a home, of the kind asked for or what the machine has. Raises UsageError."""
    root = os.geteuid() == 0
    if kind == "systemd" and not (root and _SYSTEMD_RUNS.is_dir()):
        why = "systemd is not this machine's init" if root else "a unit is written by root"
        raise UsageError(f"--service systemd: {why}", hint="leave it out: a plain process is started instead")
    if kind is None:
        usual = Service(home, "systemd")
        has_systemd = root and _SYSTEMD_RUNS.is_dir() and shutil.which("systemctl")
        # A plain process that was asked for and runs stays one.
        kind = "systemd" if has_systemd and (usual.unit.is_file() or not usual.runs()) else "process"
    return Service(home, kind)


def _python() -> str:
    """The interpreter that runs this, by the name that it keeps when the system is upgraded."""
    running, lasting = os.path.realpath(sys.executable), "/usr/bin/python3"
    return lasting if os.path.realpath(lasting) == running else running


def supervisor_argv(home: Home) -> list[str]:
    return [
        _python(),
        "-I",
        "-S",
        str(home.service / "edgectl"),
        "supervise",
        "--home",
        str(home.root),
    ]


def unit_text(home: Home, name: str, served: Sequence[Served]) -> str:
    """The systemd unit: a user without rights, who can write nothing and not grow. What any of `served` needs, all get.

    systemd.exec(5), systemd.resource-control(5). What an older systemd does not know, it passes over with a warning.
    """
    first = served[0]
    argv = " ".join(_quoted(part) for part in supervisor_argv(home))
    hosts = {item.settings.host for item in served}
    local = hosts <= _OWN_ADDRESSES
    # An address of one network can be listened on when that network is up.
    online = not hosts <= {*_OWN_ADDRESSES, "0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    gpu = any(item.manifest["runtime"]["backend"] != "CPU" for item in served)
    # A file that is gone would keep the unit from starting.
    keys: dict[str, str] = {}
    for item in served:
        if (path := item.settings.api_key_file) and Path(path).is_file():
            taken = keys.get(item.release, path) != path
            keys[supervise.credential(item.release, path) if taken else item.release] = path
    lines = [
        "# Written by edgectl install; edgectl uninstall takes it away.",
        "[Unit]",
        f"Description={first.manifest['name']}, a language model on {first.settings.host}:{first.settings.port}",
        *(["Wants=network-online.target", "After=network-online.target"] if online else ["After=network.target"]),
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"ExecStart={argv}",
        "Restart=always",
        "RestartSec=1",
        "TimeoutStopSec=30",
        "SuccessExitStatus=143",
        "KillMode=mixed",
        "DynamicUser=yes",
        f"RuntimeDirectory={name}",
        *(f"LoadCredential={called}:{path.replace('%', '%%')}" for called, path in keys.items()),
        f"MemoryMax={max(memory_limit_bytes(item.manifest) for item in served)}",
        "MemorySwapMax=0",
        "OOMPolicy=continue",
        "TasksMax=512",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        # A home below /home or /root must stay readable.
        "ProtectHome=read-only",
        "PrivateTmp=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectHostname=yes",
        "ProtectProc=invisible",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        # By ProtectClock an older systemd allows the clock's device and no other; CUDA runs memory that it has written.
        *(_gpu_groups() if gpu else ["PrivateDevices=yes", "ProtectClock=yes", "MemoryDenyWriteExecute=yes"]),
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallErrorNumber=EPERM",
        "UMask=0077",
        *(["IPAddressDeny=any", "IPAddressAllow=localhost"] if local else []),
        "",
        "[Install]",
        f"WantedBy={_TARGET}",
    ]
    return "\n".join(lines) + "\n"


def _gpu_groups() -> list[str]:
    """Groups that a GPU's devices belong to, as on a Jetson; an unknown one would keep the unit from starting."""
    found = [name for name in ("video", "render") if name in {group.gr_name for group in grp.getgrall()}]
    return [f"SupplementaryGroups={' '.join(found)}"] if found else []


def memory_limit_bytes(manifest: dict[str, Any]) -> int:
    """A limit that only a leak reaches: weights twice, mapped and repacked, keys and values, and the server's own."""
    model = manifest["model"]
    return 2 * int(model["bytes"]) + int(model["cache_bytes"]) + 2 * files.SERVER_BYTES


def _quoted(part: str) -> str:
    """One word of ExecStart: systemd expands % and $ in it."""
    escaped = part.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _systemctl(*arguments: str) -> None:
    try:
        done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise DeviceError(f"systemctl cannot be run: {error.strerror}", hint="--service process") from None
    if done.returncode != 0:
        raise DeviceError(
            f"systemctl {' '.join(arguments)}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}",
            hint="journalctl --unit edgectl",
        )
