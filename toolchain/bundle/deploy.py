"""Put a bundle in service on devices, by the system's ssh and rsync: ask, copy, install, fetch the records."""

import contextlib
import inspect
import json
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from toolchain import process
from toolchain.bundle import seal
from toolchain.device import files, launch, processor, releases
from toolchain.device.errors import RolledBackError
from toolchain.device.facts import FactError, Files
from toolchain.errors import ExternalToolError, HostError, RecipeError

Outcome = Literal["installed", "was there", "rolled back", "refused", "failed", "unreachable", "interrupted"]
Step = Literal["waiting", "asking", "copying", "installing", "done"]
Say = Callable[[str], None]
STAGING = ".cache/edgectl/incoming"
"""Below the login folder on the device."""
_PYTHON_NEEDED = (3, 10)
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
# What ssh could take for an option, or a shell for more than a name, is no name of a device.
_DEVICE = re.compile(rf"(?:{_WORD}@)?(?:{_WORD}|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*(?:%{_WORD})?)", re.ASCII)
# A question would wait for an answer that nobody gives; a line that died would be waited for. The user's options come
# before all but the first of these, and ssh takes the first of each that it sees: ssh_config(5).
_NO_QUESTIONS = ("-o", "BatchMode=yes")
_SSH_DEFAULTS = (
    *("-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
    *("-o", "LogLevel=ERROR"),
)
_NOT_BEGUN = "not begun: nothing was changed there"
_SSH_FAILED = 255
_NOT_FOUND = 127
_LINE_LOST = (10, 12, 30, 35, _SSH_FAILED)
"""rsync(1), EXIT VALUES: socket, protocol stream, time-outs; and ssh's own."""
_RSYNC_INTERRUPTED = 20
_PERCENT = re.compile(r"\s*[\d,.]+[KMGT]?\s+(\d+)%\s")
_SENT = re.compile(r"Total bytes sent: ([\d,]+)")
# Any Python 3 must understand it, to be told that it is too old. Run as the user who will install, who may not be the
# one who logs in: SUDO_USER is.
_QUESTION = f"""\
import json, os, platform, shutil, sys
SYSTEM_HOME = {launch.SYSTEM_HOME!r}
{inspect.getsource(launch.default_home)}
release, home, staging = sys.argv[1:]
login = os.path.expanduser("~" + os.environ.get("SUDO_USER", ""))
home = os.path.join(login, home) if home else default_home()
try:
    with open(os.path.join(home, "state.json")) as file:
        good = json.load(file).get("good")
except (OSError, ValueError):
    good = None
try:
    with open("/proc/cpuinfo", errors="replace") as file:
        cores = sorted({{line for line in file if line.startswith(("Features", "flags"))}})
except OSError:
    cores = []
there = [os.path.join(home, "releases", release), os.path.join(home, "current")]
print(json.dumps({{
    "python": list(sys.version_info[:2]), "arch": platform.machine(), "rsync": shutil.which("rsync"), "login": login,
    "home": home, "good": good, "staging": os.path.join(login, staging), "cores": cores,
    "copies": sorted({{os.path.realpath(path) for path in there if os.path.isdir(path)}}),
}}))
"""


@dataclass(frozen=True)
class Options:
    """How the bundle is to be installed; paths are the device's, below the login folder where they are relative."""

    home: str | None = None
    service: str | None = None
    host: str | None = None
    port: int | None = None
    api_key_file: str | None = None
    allowed_signers: str | None = None
    signer: str | None = None
    staging: str = STAGING
    sudo: bool = False
    bench: bool = False
    ssh_options: tuple[str, ...] = ()
    """As after ssh's -o."""
    bwlimit: str | None = None
    """As rsync's: KiB/s, or with a unit."""


@dataclass
class Result:
    """What became of one device."""

    device: str
    records: Path
    """Folder with install.json, info.json, bench.json, as far as it came, and log.txt."""
    outcome: Outcome = "interrupted"
    reason: str | None = _NOT_BEGUN
    """Why it is not well; also of a device that is installed, when its records are not whole."""
    hint: str | None = None
    release: str | None = None
    seconds: float = 0.0
    sent_bytes: int | None = None
    tokens_per_s: float | None = None
    step: Step = "waiting"

    @property
    def well(self) -> bool:
        return self.outcome in ("installed", "was there") and self.reason is None


class Fleet:
    """A bundle and the devices it goes to. `results` tells at any time how far each of them is."""

    def __init__(self, devices: str, folder: Path, *, options: Options, jobs: int, out: Path | None, say: Say) -> None:
        """Check everything that can be checked here. Raises RecipeError, HostError, ArtifactError."""
        names = parse_devices(devices)
        for program in ("ssh", "rsync"):
            if shutil.which(program) is None:
                package = "openssh-client" if program == "ssh" else program
                raise HostError(f"no {program} on this machine", hint=f"apt-get install {package}")
        self.bundle = seal.open_whole(folder.absolute(), read=True)
        short = self.bundle.id.removeprefix("sha256:")[:12]
        out = out if out is not None else Path("deploy", short)
        self.results = [Result(name, out / name) for name in names]
        self._options, self._jobs, self._say = options, jobs, say
        self._group = process.Group()

    def run(self) -> None:
        """Deploy to all; when this is interrupted, end what was started here and raise again."""
        tasks: list[Future[None]] = []
        with ThreadPoolExecutor(max_workers=self._jobs) as pool:
            try:
                for result in self.results:
                    tasks.append(pool.submit(self._one(result).run))
                wait(tasks)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._group.stop()
                wait(task for task in tasks if not task.cancelled())
                raise
        for task in tasks:
            task.result()  # a bug's traceback

    def _one(self, result: Result) -> "_Deployment":
        return _Deployment(result, self.bundle, self._options, self._group, self._say)

    @property
    def well(self) -> bool:
        return all(result.well for result in self.results)

    def report(self) -> dict[str, Any]:
        devices = [{**asdict(result), "records": str(result.records)} for result in self.results]
        return {"schema_version": 1, "bundle": self.bundle.id, "well": self.well, "devices": devices}

    def table(self) -> str:
        """All devices, and below them what is not well and what to do."""
        rows = [("device", "outcome", "release", "seconds", "MB sent", "tokens/s")]
        rows += [
            (
                result.device,
                result.outcome,
                result.release or "-",
                f"{result.seconds:.1f}",
                f"{result.sent_bytes / 1e6:.1f}" if result.sent_bytes is not None else "-",
                f"{result.tokens_per_s:.1f}" if result.tokens_per_s is not None else "-",
            )
            for result in self.results
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if index < 3 else text.rjust(width)
                for index, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        for result in self.results:
            if result.reason is not None:
                lines.append(f"{result.device}: {result.reason}")
                lines += [f"    → {result.hint}"] if result.hint else []
        return "\n".join(lines)


def parse_devices(text: str) -> list[str]:
    """[USER@]HOST, separated by commas. Raises RecipeError."""
    names = text.split(",")
    for name in names:
        if not name:
            raise RecipeError(f"{text!r}: the name of a device is empty", hint="user@host,user@host without spaces")
        if not _DEVICE.fullmatch(name):
            hint = "user@host, or a Host of ~/.ssh/config; a port goes by -o Port=2222"
            raise RecipeError(f"{name!r} is not the name of a device", hint=hint)
        if names.count(name) > 1:
            raise RecipeError(f"{name} is given twice", hint="name each device once")
    return names


class _FailedError(Exception):
    """The end for this device."""

    def __init__(self, outcome: Outcome, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.outcome, self.reason, self.hint = outcome, reason, hint


class _ExitError(Exception):
    """A program did not end well: its exit code, and what it said."""

    def __init__(self, code: int, lines: Sequence[str]) -> None:
        self.code, self.lines = code, lines
        super().__init__(self.last)

    def said(self, label: str) -> str | None:
        """The last line with a label that edgectl gives its last words: "error" or "hint"."""
        found = [line.removeprefix(f"{label}: ") for line in self.lines if line.startswith(f"{label}: ")]
        return found[-1] if found else None

    @property
    def disk_full(self) -> bool:
        return any(process.DISK_FULL in line for line in self.lines)

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else f"exit code {self.code}, and no word"


class _Cores(Files):
    """The lines of a device's /proc/cpuinfo that say what its cores have."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines

    def read(self, path: str) -> str:
        return "".join(self._lines)


@dataclass
class _Deployment:
    """One device's way."""

    result: Result
    bundle: files.Bundle
    options: Options
    group: process.Group
    report: Say
    found: dict[str, Any] = field(default_factory=dict)
    """What the device answered to _QUESTION."""

    def run(self) -> None:
        result, started_s = self.result, time.monotonic()
        try:
            self._ask()
            self._copy()
            self._install()
            self._record()
        except _FailedError as error:
            if result.step == "done":
                result.reason = f"it serves; its records are not whole: {error.reason}"
            else:
                result.outcome, result.reason = error.outcome, error.reason
            result.hint = error.hint
            self._say(f"{result.outcome}: {result.reason}")
        finally:
            result.seconds = round(time.monotonic() - started_s, 1)

    def _ask(self) -> None:
        """Can it take the bundle at all?"""
        self.result.step = "asking"
        answer = self.result.records / "answer.json"
        question = ["python3", "-I", "-S", "-c", _QUESTION, releases.release_name(self.bundle.manifest)]
        question += [self.options.home or "", self.options.staging]
        try:
            self._ssh([*self._sudo(), *question], stdout=answer)
            # A login shell may print something of its own before.
            self.found = dict(json.loads(answer.read_text(errors="replace").strip().splitlines()[-1]))
        except _ExitError as error:
            if error.code == _NOT_FOUND:
                missing = "sudo or python3" if self.options.sudo else "python3"
                raise _FailedError("refused", f"no {missing} there: {error.last}", "install it there") from None
            hint = "give the user that right, or leave out --sudo" if self.options.sudo else None
            raise _FailedError("refused", error.last, hint) from None
        except (ValueError, TypeError, IndexError):
            raise _FailedError("refused", "its answer is not ours", f"ssh {self.result.device} python3 -V") from None
        finally:
            answer.unlink(missing_ok=True)
        found, arch = self.found, self.bundle.manifest["target"]["arch"]
        if tuple(found["python"]) < _PYTHON_NEEDED:
            have, need = (".".join(map(str, version)) for version in (found["python"], _PYTHON_NEEDED))
            raise _FailedError("refused", f"python3 there is {have}; edgectl needs {need}", "install a newer one there")
        if found["arch"] != arch:
            reason = f"it is {found['arch']}, the bundle is for {arch}"
            raise _FailedError("refused", reason, "build the bundle for it (docs/targets.md)")
        with contextlib.suppress(FactError):  # not known: the edgectl there is asked before anything changes
            needed, lacking = processor.needed_and_missing(self.bundle.manifest, _Cores(found["cores"]))
            if lacking:
                raise _FailedError(
                    "refused", processor.lacks(needed, lacking), "build the bundle for it (docs/targets.md)"
                )
        if found["rsync"] is None:
            raise _FailedError("refused", "no rsync there", "apt-get install rsync, there")

    def _copy(self) -> None:
        """Send what is not there yet, neither in a copy that was broken off nor in a release."""
        self.result.step = "copying"
        self._say("copying what is not there")
        said = 0

        def on_line(line: str) -> None:
            nonlocal said
            if (percent := _PERCENT.match(line)) and int(percent[1]) >= said + 10:
                said = int(percent[1])
                self._say(f"copied: {said} %")

        try:
            lines = self._run(self._rsync_argv(), on_line=on_line)
        except _ExitError as error:
            if error.code == _RSYNC_INTERRUPTED:
                raise self._interrupted() from None
            if error.disk_full:
                raise self._disk_full() from None
            # The first line has the cause; what follows is how rsync took it.
            plain = [line for line in error.lines if not _PERCENT.match(line)]
            reason, hint = plain[0] if plain else error.last, "what has arrived is kept: deploy again to go on"
            lost = error.code in _LINE_LOST
            raise _FailedError("unreachable" if lost else "failed", f"while copying: {reason}", hint) from None
        sent = next((match for line in lines if (match := _SENT.match(line))), None)
        self.result.sent_bytes = int(sent[1].replace(",", "")) if sent else None

    def _rsync_argv(self) -> list[str]:
        """Content decides what is sent, by --checksum: a model that was packed, unpacked, linked or built again keeps
        its bytes and no time, and a small file can change within a second and keep its size. Releases that are there
        give what has not changed, as links, or what resembles it: a model's name has the version in it.
        """
        # A second --fuzzy means: in those releases as well. It must come to the rsync there by --protect-args' way, or
        # it is heard before --link-dest is, and forgotten.
        device, incoming = self.result.device, self._incoming
        user, _, host = device.rpartition("@")
        place = f"{user + '@' if user else ''}{f'[{host}]' if ':' in host else host}:{incoming}/"
        limit = [f"--bwlimit={self.options.bwlimit}"] if self.options.bwlimit else []
        return [
            *("rsync", "--recursive", "--perms", "--chmod=Du=rwx,Dgo=rx,Fu=rwX,Fgo=rX", "--checksum", "--partial"),
            *("--delete", "--protect-args", "--fuzzy", "--remote-option=--fuzzy"),
            *(f"--link-dest={copy}" for copy in self.found["copies"]),
            *("--info=progress2", "--stats", "--no-human-readable", *limit),
            f"--rsync-path=mkdir -p {shlex.quote(incoming)} && rsync",
            f"--rsh={shlex.join(self._ssh_argv())}",
            *("--", f"{self.bundle.root}/", place),
        ]

    @property
    def _incoming(self) -> str:
        return f"{self.found['staging']}/{files.folder_name(self.bundle.manifest)}"

    def _install(self) -> None:
        self.result.step = "installing"
        record = self.result.records / "install.json"
        try:
            self._edgectl(self._incoming, "install", *self._install_options(), stdout=record)
        except _ExitError as error:
            reason, hint = error.said("error") or error.last, error.said("hint")
            if error.code == RolledBackError.exit_code:
                self.result.release = releases.release_name(self.bundle.manifest)
                self._clear()  # it lies among the releases
                raise _FailedError("rolled back", reason, hint) from None
            if error.disk_full:
                raise self._disk_full() from None
            raise _FailedError("refused", reason, hint) from None
        self.result.release = str(self._read(record)["release"])
        self.result.outcome = "was there" if self.found["good"] == self.result.release else "installed"
        self.result.step, self.result.reason = "done", None
        self._clear()

    def _install_options(self) -> list[str]:
        """What the user gave, and the folder that was asked for its releases. The rest stays as the last one had it."""
        options, login = self.options, self.found["login"]
        given = {
            "--home": self.found["home"],
            "--service": options.service,
            "--host": options.host,
            "--port": options.port,
            "--api-key-file": options.api_key_file and str(Path(login, options.api_key_file)),
            "--allowed-signers": options.allowed_signers and str(Path(login, options.allowed_signers)),
            "--signer": options.signer,
        }
        return [f"{name}={value}" for name, value in given.items() if value is not None]

    def _clear(self) -> None:
        """The release is what stays on the device, once."""
        try:
            self._ssh(["rm", "-rf", "--", self._incoming])
        except (_ExitError, _FailedError) as error:
            self._say(f"{self._incoming} is left there: {error}")

    def _record(self) -> None:
        """What the device says of itself, and how fast it is, by the release that is installed."""
        release = f"{self.found['home']}/releases/{self.result.release}"
        for verb in ("info", "bench") if self.options.bench else ("info",):
            record = self.result.records / f"{verb}.json"
            try:
                self._edgectl(release, verb, stdout=record)
            except _ExitError as error:
                reason, hint = error.said("error") or error.last, error.said("hint")
                raise _FailedError("failed", f"edgectl {verb}: {reason}", hint) from None
            if verb == "bench":
                self.result.tokens_per_s = float(self._read(record)["metrics"]["served_decode_tps"]["p50"])

    def _edgectl(self, folder: str, verb: str, *arguments: str, stdout: Path) -> None:
        """Run a bundle's edgectl there; its record goes to `stdout`, which is not there when it failed.

        Of a release that was rolled back it is: an edgectl older than that writes none.
        """
        argv = [*self._sudo(), "python3", "-I", "-S", f"{folder}/edgectl", verb, "--json", *arguments]
        try:
            self._ssh(argv, stdout=stdout, on_line=self._say)
        except BaseException as error:
            rolled_back = isinstance(error, _ExitError) and error.code == RolledBackError.exit_code
            if not (rolled_back and stdout.stat().st_size):
                stdout.unlink(missing_ok=True)
            raise

    def _read(self, record: Path) -> dict[str, Any]:
        try:
            found: dict[str, Any] = dict(json.loads(record.read_bytes()))
        except (ValueError, TypeError):
            hint = "does the login shell there print something of its own?"
            raise _FailedError("failed", f"{record} is no record", hint) from None
        return found

    def _sudo(self) -> list[str]:
        return ["sudo", "-n"] if self.options.sudo else []

    def _ssh_argv(self) -> list[str]:
        given = [part for option in self.options.ssh_options for part in ("-o", option)]
        return ["ssh", "-T", *_NO_QUESTIONS, *given, *_SSH_DEFAULTS]

    def _ssh(self, argv: Sequence[str], *, stdout: Path | None = None, on_line: Say | None = None) -> None:
        """Run a program there. Raises _ExitError with its exit code, _FailedError when the line is not there."""
        try:
            command = [*self._ssh_argv(), "--", self.result.device, shlex.join(argv)]
            self._run(command, stdout=stdout, on_line=on_line)
        except _ExitError as error:
            if error.code != _SSH_FAILED:
                raise
            if self.result.step == "installing":
                raise _FailedError("unreachable", f"while installing: {error.last}", self._goes_on()) from None
            raise _FailedError("unreachable", error.last, f"ssh {self.result.device} true") from None

    def _run(self, argv: Sequence[str], *, stdout: Path | None = None, on_line: Say | None = None) -> list[str]:
        """A program here; what it said."""
        lines: list[str] = []

        def keep(line: str) -> None:
            if line.strip():
                lines.append(line.strip())
                if on_line is not None:
                    on_line(line)

        if self.group.stopped:
            raise self._interrupted()
        log = self.result.records / "log.txt"
        try:
            process.run(argv, log=log, stdout=stdout, on_line=keep, group=self.group, elsewhere=True)
        except ExternalToolError as error:
            if self.group.stopped or (error.returned is not None and error.returned < 0):
                raise self._interrupted() from None
            if error.returned is None:
                raise
            raise _ExitError(error.returned, lines) from None
        return lines

    def _disk_full(self) -> _FailedError:
        reason = f"while {self.result.step}: its disk is full"
        return _FailedError("failed", reason, "free some space there, then deploy again")

    def _interrupted(self) -> _FailedError:
        states: dict[Step, tuple[str, str | None]] = {
            "waiting": (_NOT_BEGUN, None),
            "asking": (_NOT_BEGUN, None),
            "copying": ("while copying: nothing was changed there", "what has arrived is kept: deploy again to go on"),
            "installing": ("while installing", self._goes_on()),
            "done": ("interrupted", None),
        }
        return _FailedError("interrupted", *states[self.result.step])

    def _goes_on(self) -> str:
        """What is true of an installation whose listener has gone."""
        return "it goes on there by itself, and is kept or rolled back: edgectl status, or deploy again, says which"

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            self.report(f"{self.result.device}: {line}")
