"""A container engine for the tests: the one that runs, or one of our own that leaves nothing behind."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
# Debian's own client has BuildKit built in; another `docker` earlier in PATH may lack it.
CLIENTS = ("/usr/bin/docker", "docker")


class NoEngineError(Exception):
    """No engine runs and none can be started; the message says why and what to do."""


class Engine:
    """A client bound to one engine. `host` is its socket's address, None for the client's default."""

    def __init__(self, client: str, host: str | None) -> None:
        self.client = client
        self.environment = {**os.environ, "DOCKER_BUILDKIT": "1", **({"DOCKER_HOST": host} if host else {})}

    def run(self, *arguments: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """`docker ARGUMENTS`; the exit code is the caller's to judge."""
        return subprocess.run(
            [self.client, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextmanager
def engine() -> Iterator[Engine]:
    """The engine that answers, or a dockerd of our own; stopped, and its data removed, at the end."""
    client = next((found for name in CLIENTS if (found := which(name))), None)
    if client is None:
        raise NoEngineError("no docker program: install it (Debian: apt-get install docker.io)")
    running = Engine(client, None)
    if running.run("version").returncode == 0:
        yield running
        return
    if which("dockerd") is None or os.geteuid() != 0:
        raise NoEngineError("no engine answers, and starting one needs dockerd and root: start docker, then run again")
    with tempfile.TemporaryDirectory(prefix="engine-") as name, _dockerd(Path(name), client) as own:
        yield own


@contextmanager
def _dockerd(root: Path, client: str) -> Iterator[Engine]:
    host = f"unix://{root}/docker.sock"
    # Without a bridge and iptables rules nothing of the host's network changes; builds and servers use --network host.
    argv = ["dockerd", "--data-root", f"{root}/data", "--exec-root", f"{root}/exec", "--pidfile", f"{root}/pid"]
    argv += ["--host", host, "--bridge", "none", "--iptables=false", "--ip6tables=false"]
    log = root / "log"
    with log.open("wb") as sink, subprocess.Popen(argv, stdout=sink, stderr=sink) as process:
        try:
            own = Engine(client, host)
            until = time.monotonic() + READY_TIMEOUT_S
            while own.run("version").returncode != 0:
                if process.poll() is not None or time.monotonic() > until:
                    raise NoEngineError(f"dockerd did not start: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield own
        finally:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)
            # dockerd mounts its data directory on itself, and leaves that behind when another engine runs beside it.
            if f" {root}/data " in Path("/proc/self/mounts").read_text():
                subprocess.run(["umount", str(root / "data")], check=True)
