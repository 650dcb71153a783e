"""Keep the supervisor running: a systemd unit where systemd is the init and we are root, else a plain process."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, place, supervise
from .errors import DeviceError, UsageError
from .releases import SYSTEM_HOME, Home, Settings
from .serve import check_listen

UNITS = Path("/etc/systemd/system")
_SYSTEMD_RUNS = Path("/run/systemd/system")
_STOP_S = 30.0
KINDS = ("systemd", "process")


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
        return "edgectl-" + "".join(letter if letter.isalnum() else "-" for letter in str(root).strip("/"))

    @property
    def unit(self) -> Path:
        return UNITS / f"{self.name}.service"

    @property
    def note(self) -> Path:
        """Where the supervisor says what it does."""
        return supervise.note_path(self.home, f"/run/{self.name}" if self.kind == "systemd" else None)

    def ensure(self, settings: Settings, manifest: dict[str, Any]) -> None:
        """The supervisor runs, with the address and key of `settings`. Raises DeviceError."""
        check_listen(settings.host, settings.port, has_key=settings.api_key_file is not None)
        if self.kind == "systemd":
            text = unit_text(self.home, self.name, settings, manifest)
            changed = not self.unit.is_file() or self.unit.read_text(encoding="utf-8") != text
            if changed:
                place.replace(self.unit, text)
                _systemctl("daemon-reload")
            _systemctl("enable", "--quiet", self.unit.name)
            _systemctl("restart" if changed else "start", self.unit.name)
        elif not self.runs():
            self._start_process()

    def runs(self) -> bool:
        """Whether a supervisor holds the home."""
        try:
            handle = os.open(self.home.root, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            return
        pid = supervise.read_note(self.note).get("pid")
        if not self.runs() or not isinstance(pid, int):
            return
        os.kill(pid, signal.SIGTERM)
        end_s = time.monotonic() + _STOP_S
        while self.runs():
            if time.monotonic() > end_s:
                raise DeviceError(f"the service, process {pid}, does not stop", hint=f"kill -9 {pid}")
            time.sleep(0.05)

    def _start_process(self) -> None:
        log = self.home.root / "service.log"
        with log.open("ab") as out:
            subprocess.Popen(
                supervisor_argv(self.home),
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
        kind = "systemd" if root and _SYSTEMD_RUNS.is_dir() and shutil.which("systemctl") else "process"
    return Service(home, kind)


def supervisor_argv(home: Home) -> list[str]:
    return [
        os.path.realpath(sys.executable),
        "-I",
        "-S",
        str(home.service / "edgectl"),
        "supervise",
        "--home",
        str(home.root),
    ]


def unit_text(home: Home, name: str, settings: Settings, manifest: dict[str, Any]) -> str:
    """The systemd unit: a user without rights, who can write nothing and not grow.

    systemd.exec(5), systemd.resource-control(5). What an older systemd does not know, it passes over with a warning.
    """
    argv = " ".join(_quoted(part) for part in supervisor_argv(home))
    local = settings.host in ("127.0.0.1", "::1", "localhost")
    gpu = manifest["runtime"]["backend"] != "CPU"
    lines = [
        "# Written by edgectl install; edgectl uninstall takes it away.",
        "[Unit]",
        f"Description={manifest['name']}, a language model on {settings.host}:{settings.port}",
        "After=network.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"ExecStart={argv}",
        "Restart=always",
        "RestartSec=1",
        "TimeoutStopSec=30",
        "KillMode=mixed",
        "DynamicUser=yes",
        f"RuntimeDirectory={name}",
        *([f"LoadCredential={supervise.CREDENTIAL}:{settings.api_key_file}"] if settings.api_key_file else []),
        f"MemoryMax={memory_limit_bytes(manifest)}",
        "MemorySwapMax=0",
        "OOMPolicy=continue",
        "TasksMax=512",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        # A home below /home or /root must stay readable.
        "ProtectHome=read-only",
        "PrivateTmp=yes",
        f"PrivateDevices={'no' if gpu else 'yes'}",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        *([] if gpu else ["MemoryDenyWriteExecute=yes"]),
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "SystemCallErrorNumber=EPERM",
        "UMask=0077",
        *(["IPAddressDeny=any", "IPAddressAllow=localhost"] if local else []),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


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
