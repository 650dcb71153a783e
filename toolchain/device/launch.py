"""From `edgectl serve` to llama-server's spawn, and what both ways there share.

Nothing serves until this is done, so it is short, and loads next to nothing: pathlib, json, re, subprocess, socket and
argparse would take three times as long as all of it, and a sealed bundle holds no bytecode. What is used in their place
is what they call themselves. The rest of edgectl is loaded while the server loads the model.
"""

from __future__ import annotations

import _socket
import _thread
import errno
import os
import time

from . import cores, manifest
from .errors import BusyError, DeviceError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

KEY_VARIABLE = "EDGECTL_API_KEY"
HOME_VARIABLE = "EDGECTL_HOME"
"""Tells a release's edgectl which home it is served from. Not an option: an older release does not know it."""
SYSTEM_HOME = "/var/lib/edgectl"
TUNED = "tuned"
"""Folder in a home: see tuned.py."""
_PR_SET_PDEATHSIG = 1
_SIGKILL, _SIGPIPE, _SIGTERM, _SIGXFSZ = 9, 13, 15, 25
_POLL_S = 0.01
_HEAD_START_S = 0.3
"""A small model answers within it; to a larger one it is little."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Options:
    """Of the verb `serve`."""

    host = "127.0.0.1"
    port = 8080
    api_key_file: str | None = None
    home: str | None = None
    no_tuned = False
    json = False


_TEXTS = {"--host": "host", "--api-key-file": "api_key_file", "--home": "home"}
_FLAGS = {"--no-tuned": "no_tuned", "--json": "json"}


def options(arguments: Sequence[str]) -> Options | None:
    """As argparse reads them; None for what needs argparse: help, an abbreviation, a mistake."""
    found, rest = Options(), list(arguments)
    while rest:
        name, given, value = rest.pop(0).partition("=")
        if name in _FLAGS and not given:
            setattr(found, _FLAGS[name], True)
            continue
        if not given:
            if not rest or rest[0].startswith("-"):
                return None
            value = rest.pop(0)
        if name in _TEXTS:
            setattr(found, _TEXTS[name], value)
        elif name == "--port" and value.isascii() and value.isdigit():
            found.port = int(value)
        else:
            return None
    return found


class Launched:
    """A server on its way up, and what it was started from."""

    def __init__(self, asked: Options, root: str, content: bytes, described: dict[str, Any], child: Child) -> None:
        self.options = asked
        self.root = root
        self.content = content
        """Of the manifest, as it was read."""
        self.manifest = described
        self.child = child


def launch(root: str, arguments: Sequence[str]) -> Launched | None:
    """Start the server of the bundle at `root` as `serve` is asked to. None where that takes more than is done here:
    odd arguments, a GPU that must be found first, tuned settings. Raises DeviceError."""
    asked = options(arguments[1:]) if arguments[:1] == ["serve"] else None
    if asked is None:
        return None
    described, content = manifest.read_manifest(root)
    if described["runtime"]["backend"] != "CPU" or (not asked.no_tuned and _may_be_tuned(asked, described)):
        return None
    keys = read_keys(asked.api_key_file)
    check_address(asked.host, asked.port, has_key=bool(keys))
    argv = server_argv(root, manifest.read_presets(root), host=asked.host, port=asked.port, key_file=asked.api_key_file)
    child = spawn(argv, cwd=root, key=environment_key(keys, asked.api_key_file))
    return Launched(asked, root, content, described, child)


def give_way(child: Child) -> None:
    """Leave the processor to the server for a while: what we load next takes as long as a core takes to load a small
    model, and where no core is idle the server and its first answer would wait for us. It needs us for neither."""
    end_s = child.spawned_at_s + _HEAD_START_S
    while child.poll() is None and time.perf_counter() < end_s:
        time.sleep(_POLL_S)


def _may_be_tuned(asked: Options, described: dict[str, Any]) -> bool:
    home = asked.home if asked.home is not None else os.environ.get(HOME_VARIABLE) or default_home()
    try:
        names = os.listdir(os.path.join(home, TUNED))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # whoever reads the record says what is wrong
    return any(name.startswith(tuned_prefix(described["bundle_id"])) for name in names)


def tuned_prefix(bundle_id: object) -> str:
    """How the names of a bundle's records begin."""
    return f"{str(bundle_id).removeprefix('sha256:')[:12]}-"


def default_home() -> str:
    """The system's for root, and for a user without a home, as services are; else a folder of the user's own."""
    if os.geteuid() == 0:
        return SYSTEM_HOME
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return SYSTEM_HOME if data.startswith("~") else os.path.join(data, "edgectl")


def server_argv(
    root: str,
    presets: Mapping[str, Any],
    *,
    host: str,
    port: int,
    key_file: str | None,
    thread_count: int | None = None,
) -> list[str]:
    """The presets' command with its placeholders filled in; `thread_count` when other than the presets'."""
    server: dict[str, Any] = presets["server"]
    template = [*server["argv"], *(server["api_key_argv"] if key_file is not None else [])]
    values = {
        "bundle": root,
        "host": host,
        "port": str(port),
        "threads": str(threads(presets) if thread_count is None else thread_count),
        "api_key_file": os.path.realpath(key_file) if key_file is not None else "",
    }
    return fill(template, values)


def threads(presets: Mapping[str, Any]) -> int:
    """Threads of the presets, or the physical cores this process may use."""
    asked: int | None = presets["server"]["threads"]
    return cores.physical_cores() if asked is None else asked


def fill(template: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Replace each {name} by its value, once: a value with braces in it stays as it is."""
    return [_filled(part, values) for part in template]


def _filled(part: str, values: Mapping[str, str]) -> str:
    begin, *pieces = part.split("{")
    for piece in pieces:
        name, closed, rest = piece.partition("}")
        is_name = closed and name.isascii() and name.islower() and name.replace("_", "").isalpha()
        begin += values[name] + rest if is_name else "{" + piece
    return begin


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would change the programs behind the presets' back, and with large pages."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith(("LLAMA_", "GGML_", "AIP_"))
        and name not in ("LD_LIBRARY_PATH", "LD_PRELOAD", KEY_VARIABLE)
    }
    # Two thirds of a start's page faults are of memory that malloc gets: asked for in large pages there are fewer. A C
    # library or a kernel that does not know it passes over it.
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **kept}


def check_address(host: str, port: int, *, has_key: bool) -> None:
    """Refuse what cannot work or is not safe, before anything starts. Raises UsageError and DeviceError."""
    check_listen(host, port, has_key=has_key)
    try:
        _bind(host, port)
    except (_socket.gaierror, UnicodeError):
        raise UsageError(f"--host {host}: no such address") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = free_port(host)
            raise BusyError(
                f"port {port} on {host} is in use",
                hint=f"port {free} is free: ./edgectl serve --port {free}",
            ) from None
        raise DeviceError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def check_listen(host: str, port: int, *, has_key: bool) -> None:
    """An address that may be listened on. Raises UsageError."""
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port}: not between 1 and 65535")
    if not has_key and not _is_loopback(host):
        raise UsageError(
            f"--host {host} is open to the network and there is no API key",
            hint=f"add --api-key-file F or set {KEY_VARIABLE}, or leave --host out",
        )


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free now."""
    return _bind(host, 0)


def _bind(host: str, port: int) -> int:
    # Bytes are taken as they are; for a str Python would load IDNA and Unicode's tables first.
    name = host.encode() if host.isascii() else host
    family, kind, protocol, _, address = _socket.getaddrinfo(name, port, type=_socket.SOCK_STREAM)[0]
    listener = _socket.socket(family, kind, protocol)
    try:
        # As llama-server binds: a connection that is still winding down does not block the port.
        listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return int(listener.getsockname()[1])
    finally:
        listener.close()


def _is_loopback(host: str) -> bool:
    if host in _LOOPBACK:
        return True
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(key_file: str | os.PathLike[str] | None) -> list[str]:
    """The keys that are let in: a file's, one a line, or that of the environment; empty when none is set.

    Raises UsageError.
    """
    if key_file is None:
        key = os.environ.get(KEY_VARIABLE)
        if key is not None and not key.strip():
            raise UsageError(f"{KEY_VARIABLE} is set and empty", hint="unset it, or give it the key")
        # llama-server would take the parts between commas for keys of their own.
        if key is not None and ("," in key or not _can_be_sent(key)):
            raise UsageError(f"{KEY_VARIABLE}: not one key", hint=f"{_KEY_FORM}, and no comma")
        return [] if key is None else [key]
    try:
        with open(key_file, "rb") as file:
            lines = file.read().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {key_file}: cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file {key_file}: holds no key", hint="one key on each line")
    for number, line in enumerate(lines, 1):
        # llama-server takes a line as it is, and would wait for a key that no client can send.
        if line in keys and not _can_be_sent(line):
            why = "ends as Windows ends lines" if line.endswith("\r") else "is no key"
            raise UsageError(f"--api-key-file {key_file}: line {number} {why}", hint=_KEY_FORM)
    return keys


_KEY_FORM = "a key is printable ASCII, without blanks before and after it"


def _can_be_sent(key: str) -> bool:
    return key.isascii() and key.isprintable() and key == key.strip()


def environment_key(keys: Sequence[str], key_file: object) -> str | None:
    """The key that a server without a key file is told."""
    return keys[0] if keys and key_file is None else None


class Child:
    """A server's process, and its output; like subprocess.Popen, and there sooner."""

    def __init__(self, pid: int, output: int, spawned_at_s: float) -> None:
        self.pid = pid
        self.output = output
        """Descriptor of a pipe with what it writes to stdout and stderr."""
        self.spawned_at_s = spawned_at_s
        """By time.perf_counter."""
        self.returncode: int | None = None
        """As subprocess has it: below zero when a signal ended it."""
        self._lock = _thread.allocate_lock()

    def poll(self) -> int | None:
        """Exit code; None while it runs."""
        with self._lock:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # whoever started us ignores SIGCHLD: the kernel kept no code
                    pid, status = self.pid, 0
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, limit_s: float | None = None) -> int | None:
        """Wait until it ends; None when it has not after `limit_s`."""
        if limit_s is None:
            try:
                # It stays a zombie, whose number is nobody else's, until `poll` has taken the lock.
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                pass
            return self.poll()
        end_s = time.monotonic() + limit_s
        while (code := self.poll()) is None and time.monotonic() < end_s:
            time.sleep(_POLL_S)
        return code

    def terminate(self) -> None:
        self._signal(_SIGTERM)

    def kill(self) -> None:
        self._signal(_SIGKILL)

    def _signal(self, number: int) -> None:
        with self._lock:
            if self.returncode is None:
                os.kill(self.pid, number)


def spawn(argv: Sequence[str], *, cwd: str, key: str | None = None) -> Child:
    """Start the server; it dies with this process. Raises DeviceError.

    A `key` goes by the environment, which unlike the arguments only its user can read.
    """
    environment = clean_environment(os.environ)
    if key is not None:
        environment["LLAMA_API_KEY"] = key
    prepare = _in_child()
    start_s = time.perf_counter()
    output, written = os.pipe()
    failure, failed = os.pipe()  # closed by a successful exec
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(written, 1)
            os.dup2(written, 2)
            os.chdir(cwd)
            prepare()
            os.execve(argv[0], list(argv), environment)  # noqa: S606
        except OSError as error:
            os.write(failed, str(error.errno).encode())
        finally:
            os._exit(1)
    os.close(written)
    os.close(failed)
    child = Child(pid, output, start_s)
    code = os.read(failure, 16)
    os.close(failure)
    if code:
        child.wait()
        os.close(output)
        raise DeviceError(
            f"cannot start {argv[0]}: {os.strerror(int(code))}", hint="./edgectl verify says what is wrong"
        )
    return child


def _in_child() -> Callable[[], None]:
    """What a server does between fork and exec: a session of its own, so that Ctrl-C reaches edgectl alone, which then
    asks the server once; signals as a program expects them; nothing open that was left open to us."""
    import ctypes

    library = ctypes.CDLL(None)
    die, default = die_with_parent(), ctypes.c_void_p(None)

    def prepare() -> None:
        os.setsid()
        die()
        for number in (_SIGPIPE, _SIGXFSZ):  # ignored by Python
            library.signal(number, default)
        for name in os.listdir("/proc/self/fd"):
            try:
                os.set_inheritable(int(name), int(name) <= 2)
            except OSError:  # that of the list itself
                pass

    return prepare


def die_with_parent() -> Callable[[], None]:
    """For the child before exec: Linux kills it when its parent dies, so a kill −9 of edgectl leaves no server."""
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return ask
