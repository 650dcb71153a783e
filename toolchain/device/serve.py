"""Start llama-server as the presets say, wait until it is ready, and stop it; no server outlives its edgectl."""

import collections
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from . import launch
from .errors import DeviceError
from .files import Bundle, bundle_of, problems, sha256
from .launch import (
    KEY_VARIABLE,
    Child,
    Launched,
    check_address,
    check_listen,
    clean_environment,
    die_with_parent,
    fill,
    free_port,
    read_keys,
)

if TYPE_CHECKING:
    # Not needed while a server loads, which has the processor to itself then.
    import subprocess

    from .tuned import Tuned

__all__ = ["KEY_VARIABLE", "check_address", "check_listen", "clean_environment", "fill", "free_port", "read_keys"]
"""Of the start, for those who have to do with servers."""

Tell = Callable[[dict[str, object]], None]
"""Takes an event, for programs: "event" is "ready" or "ended"."""

_STOP_GRACE_S = 10.0
_DEVICES_TIMEOUT_S = 60.0
_POLL_S = 0.005
_LOG_LINES = 4000
TRACE = ("--verbosity", "4")
"""The server then says which backend holds which buffer."""


class Server:
    """A running llama-server. Use in a `with` block: it is stopped at the end whatever happens."""

    def __init__(self, child: Child, *, host: str, port: int, on_line: Callable[[str], None] | None = None) -> None:
        """Take over a server that was spawned."""
        self.host, self.port = host, port
        self.health: list[str] = []
        """What /health said on the way up, each once: "refused", "503", "200"."""
        self.log: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        self.listening_s = math.nan
        """Spawn → somebody answers at the port, if only that it is not ready."""
        self.ready_s = math.nan
        """Spawn → /health is 200, once `wait_ready` has returned."""
        self._on_line = on_line
        self.spawned_at_s = child.spawned_at_s
        self._child = child
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_ready(self, timeout_s: float) -> float:
        """Poll /health until it is 200; seconds since the spawn. Raises DeviceError when the server ends or is late."""
        # Python's HTTP takes as long to load as the server does to listen: it is not waited for before the spawn.
        from .client import Client

        client = Client(local_address(self.host), self.port, timeout_s=timeout_s)
        while True:
            if self._child.poll() is not None:
                self._reader.join(1)
                raise DeviceError(f"llama-server {self.ended()}: {self.last_error()}")
            try:
                status = str(client.request("GET", "/health", with_key=False)[0])
            except OSError:
                status = "refused"
            now_s = time.perf_counter()
            if status != "refused" and math.isnan(self.listening_s):
                self.listening_s = now_s - self.spawned_at_s
            if status not in self.health:
                self.health.append(status)
            if status == "200":
                self.ready_s = now_s - self.spawned_at_s
                return self.ready_s
            if now_s - self.spawned_at_s > timeout_s:
                raise DeviceError(
                    f"llama-server was not ready after {timeout_s:.0f} s: {self.last_error()}",
                    hint="server.ready_timeout_s in presets.json is the limit",
                )
            time.sleep(_POLL_S)

    def wait(self) -> None:
        """Wait until the server ends by itself."""
        self._child.wait()

    def stop(self) -> tuple[int, float]:
        """SIGTERM, and SIGKILL to one that does not listen: exit code (−9 when killed) and seconds taken."""
        start_s = time.perf_counter()
        if self._child.poll() is None:
            self._child.terminate()
            if self._child.wait(_STOP_GRACE_S) is None:
                self._child.kill()
                self._child.wait()
        self._reader.join(1)
        assert self._child.returncode is not None
        return self._child.returncode, time.perf_counter() - start_s

    def libraries(self) -> list[str]:
        """Names of the backends' libraries, as far as the log has been read; with TRACE it names them."""
        return [line.rsplit("/", 1)[-1] for line in list(self.log) if re.search(r"loaded \S+ backend from ", line)]

    def kill(self) -> None:
        """End it at once, from another thread: whoever waits for its answer gets an OSError."""
        self._child.kill()

    def last_error(self) -> str:
        """The server's last line at error level, or its last line."""
        lines = [line for line in self.log if line.strip()]
        errors = [line for line in lines if re.match(r"\S+ E ", line) and "exiting due to" not in line]
        return (errors or lines or ["it said nothing"])[-1].strip()[:400]

    def ended(self) -> str:
        code = self._child.returncode
        assert code is not None
        if code >= 0:
            return f"ended with exit code {code}"
        more = " (a processor too old for the programs?)" if -code == signal.SIGILL else ""
        more = " (often: out of memory)" if -code == signal.SIGKILL else more
        return f"was ended by {signal.Signals(-code).name}{more}"

    def _read_log(self) -> None:
        with open(self._child.output, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - a descriptor
            for line in lines:
                self.log.append(line.rstrip("\n"))
                if self._on_line is not None:
                    self._on_line(line.rstrip("\n"))

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def local_address(host: str) -> str:
    """Where a server that listens on `host` is asked from the machine itself."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound


def spawn(argv: Sequence[str], *, cwd: Path, stderr: int) -> "subprocess.Popen[str]":
    """Start one of the bundle's programs that is to end by itself; it dies with this process. Raises DeviceError."""
    import subprocess

    try:
        return subprocess.Popen(
            argv,
            cwd=cwd,
            env=clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches edgectl alone
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, no locks taken
        )
    except OSError as error:
        raise DeviceError(
            f"cannot start {argv[0]}: {error.strerror}", hint="./edgectl verify says what is wrong"
        ) from error


def start(
    bundle: Bundle,
    *,
    host: str,
    port: int,
    key_file: Path | None = None,
    key: str | None = None,
    thread_count: int | None = None,
    extra: Sequence[str] = (),
    on_line: Callable[[str], None] | None = None,
) -> Server:
    """Start the bundle's server. Raises DeviceError, also where it would compute on something else than is promised.

    Of an option that is given twice llama-server takes the later one: `extra` overrides the presets.
    """
    require_backend(bundle)
    root, file = str(bundle.root), None if key_file is None else str(key_file)
    command = launch.server_argv(root, bundle.presets(), host=host, port=port, key_file=file, thread_count=thread_count)
    return Server(launch.spawn([*command, *extra], cwd=root, key=key), host=host, port=port, on_line=on_line)


def require_backend(bundle: Bundle) -> None:
    """A GPU that is promised is found by the programs. Raises DeviceError: the CPU would be used without a word.

    A CPU is found by whatever runs at all, and is not asked for.
    """
    expected = str(bundle.manifest["runtime"]["backend"])
    if expected == "CPU":
        return
    import subprocess

    argv = fill(bundle.presets()["devices"]["argv"], {"bundle": str(bundle.root)})
    with spawn(argv, cwd=bundle.root, stderr=subprocess.STDOUT) as child:
        try:
            said, _ = child.communicate(timeout=_DEVICES_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            raise DeviceError(f"llama-server did not name its devices within {_DEVICES_TIMEOUT_S:.0f} s") from None
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = any(re.match(rf"{re.escape(expected)}\d+:", line) for line in lines)  # "CUDA error: …" names none
    if child.returncode != 0 or not named:
        last = (lines or ["it said nothing"])[-1]
        raise DeviceError(
            f"llama-server finds no {expected} device, and would use the processor: {last}",
            hint="./edgectl verify names libraries that are missing; is the GPU's driver loaded, and new enough?",
        )


def threads(bundle: Bundle) -> int:
    """Threads of the presets, or the physical cores this process may use."""
    return launch.threads(bundle.presets())


def ready_timeout_s(bundle: Bundle) -> float:
    return float(bundle.presets()["server"]["ready_timeout_s"])


class Restarts:
    """How long to wait before a program that has ended is started again, and when to give up."""

    FIRST_S, LONGEST_S = 0.5, 30.0
    STEADY_S = 60.0
    LIMIT = 6

    def __init__(self) -> None:
        self._in_a_row = 0

    def after(self, lived_s: float) -> float | None:
        """Seconds to wait, twice as many each time; None after six short lives in a row.

        A life of a minute or more ends the row: what crashes once a day is started again for ever.
        """
        self._in_a_row = 1 if lived_s >= self.STEADY_S else self._in_a_row + 1
        if self._in_a_row > self.LIMIT:
            return None
        return float(min(self.LONGEST_S, self.FIRST_S * 2 ** (self._in_a_row - 1)))


def nobody(event: dict[str, object]) -> None:
    """Events that nobody asked for."""


def go_on(launched: Launched, say: Callable[[str], None], tell: Tell) -> None:
    """Serve with a server that was started already; otherwise as `run`."""
    asked = launched.options
    bundle = bundle_of(Path(launched.root), launched.manifest, launched.content)
    first = Server(launched.child, host=asked.host, port=asked.port, on_line=say)
    key_file = None if asked.api_key_file is None else Path(asked.api_key_file)
    run(bundle, host=asked.host, port=asked.port, key_file=key_file, say=say, tell=tell, first=first)


def run(
    bundle: Bundle,
    *,
    host: str,
    port: int,
    key_file: Path | None,
    tuned: "Tuned | None" = None,
    say: Callable[[str], None],
    tell: Tell = nobody,
    first: Server | None = None,
) -> None:
    """Serve until a signal (raised as an exception by `main`) ends it; a server that crashes is started again.

    With `tuned` settings, unless it does not start with them. `first` was started already, its address checked before
    that. Raises DeviceError when it does not become ready the first time, or ends again and again, or is damaged by
    then.
    """
    keys = read_keys(key_file)
    if first is None:
        check_address(host, port, has_key=bool(keys))
    restarts, was_ready = Restarts(), False
    say("settings: the presets'" if tuned is None else f"settings: tuned, {tuned.gain:.2f} × as fast: {tuned}")
    while True:
        lived_s = 0.0
        try:
            server = first or start(
                bundle,
                host=host,
                port=port,
                key_file=key_file,
                key=launch.environment_key(keys, key_file),
                thread_count=tuned.threads if tuned is not None else None,
                extra=tuned.arguments if tuned is not None else (),
                on_line=say,
            )
            first = None
            with server:
                digest = _Digest(bundle.model)
                try:
                    seconds = server.wait_ready(ready_timeout_s(bundle))
                except DeviceError as error:
                    if tuned is None or was_ready:
                        raise
                    say(f"{error.message}; the tuned settings are left out")
                    tuned = None
                    continue
                require_model(bundle, server, keys, digest)
                shown = f"[{host}]" if ":" in host else host
                url, name = f"http://{shown}:{port}", bundle.manifest["name"]
                say(f"ready after {seconds:.2f} s: {name} on {url} (chat page) and {url}/v1 (API)")
                tell({"event": "ready", "bundle": bundle.id, "url": url, "pid": server.pid, "seconds": seconds})
                was_ready = True
                server.wait()
                ended = f"llama-server {server.ended()}: {server.last_error()}"
                lived_s = time.perf_counter() - server.spawned_at_s
        except DeviceError as error:
            if not was_ready:
                raise
            # What has served may lack memory or its port for a while; what is damaged does not mend itself.
            if problems(bundle):
                tell({"event": "ended", "bundle": bundle.id, "reason": error.message, "again_in_s": None})
                raise
            ended = error.message
        wait_s = restarts.after(lived_s)
        tell({"event": "ended", "bundle": bundle.id, "reason": ended, "again_in_s": wait_s})
        if wait_s is None:
            raise DeviceError(f"{ended}; it ended {restarts.LIMIT + 1} times in a row", hint="./edgectl doctor, smoke")
        say(f"{ended}; started again in {wait_s:g} s")
        time.sleep(wait_s)


class _Digest:
    """SHA-256 of a file, taken aside while the server loads it, by a thread that gives way to everything else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[str | OSError] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def result(self) -> str:
        """In hex. Raises DeviceError."""
        self._reader.join()
        (found,) = self._found
        if isinstance(found, OSError):
            raise DeviceError(f"{self._path}: cannot be read: {found.strerror}")
        return found

    def _read(self) -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # of this thread alone, and without any right
            self._found.append(sha256(self._path))
        except OSError as error:
            self._found.append(error)


def require_model(bundle: Bundle, server: Server, keys: Sequence[str], digest: _Digest) -> None:
    """The server has this bundle's model, and the file's bytes are those that were built. Raises DeviceError."""
    from .client import Client

    client = Client(local_address(server.host), server.port, keys[0] if keys else None)
    try:
        path = Path(client.get("/props")["model_path"])
    except OSError as error:
        raise DeviceError(f"llama-server no longer answers ({error}): {server.last_error()}") from error
    if not path.samefile(bundle.model):
        raise DeviceError(f"the server has loaded {path}, not the bundle's {bundle.model}")
    sha256_now = digest.result()
    if sha256_now != bundle.manifest["model"]["sha256"]:
        raise DeviceError(
            f"{path}: its bytes are not those that were built: sha256 {sha256_now}", hint="copy the bundle again"
        )
