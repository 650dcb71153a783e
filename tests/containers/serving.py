"""A bundle's image in a container, confined as on a device: started, asked, stopped."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.containers.engine import Engine

CONFINED = ("--read-only", "--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
KEY = "a key of this test"
# What runs in the container: its own Python asks its own server, since the network is its own.
ASK = f"""
import json, sys, urllib.request
path, body = sys.argv[1], sys.argv[2].encode()
headers = {{"Authorization": "Bearer {KEY}"}} if len(sys.argv) < 4 else {{}}
request = urllib.request.Request("http://127.0.0.1:8080" + path, body, headers)
try:
    print(urllib.request.urlopen(request, timeout=120).read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""


@contextmanager
def running(docker: Engine, tag: str, folder: Path, *options: str) -> Iterator[str]:
    """The container's name, once its server is ready."""
    key = folder / "api_key"
    key.write_text(KEY)
    key.chmod(0o644)
    name = f"toolchain-test-{os.getpid()}-{time.monotonic_ns()}"
    secret = f"{key}:/run/secrets/api_key:ro"
    try:
        started = docker.run("run", "--detach", "--name", name, *CONFINED, "--volume", secret, *options, tag)
        assert started.returncode == 0, started.stderr
        limit = time.monotonic() + 120
        while "ready after" not in (said := docker.run("logs", name).stderr):
            assert inspect(docker, name)["State"]["Running"], said
            assert time.monotonic() < limit, said
            time.sleep(0.2)
        yield name
    finally:
        docker.run("rm", "--force", name)


def inspect(docker: Engine, name: str) -> dict[str, Any]:
    (found,) = json.loads(docker.run("inspect", name).stdout)
    content: dict[str, Any] = found
    return content


def ask(docker: Engine, name: str, path: str, body: dict[str, Any], *more: str) -> Any:
    done = docker.run("exec", name, "python3", "-I", "-S", "-c", ASK, path, json.dumps(body), *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expect_confined(docker: Engine, name: str) -> None:
    """Not as root, without capabilities, and on a root that cannot be written."""
    status = docker.run("exec", name, "python3", "-c", "print(open('/proc/1/status').read())").stdout
    assert "Uid:\t65532\t65532\t65532\t65532" in status
    assert "CapEff:\t0000000000000000" in status
    written = docker.run("exec", name, "python3", "-c", "open('/bundle/x', 'w')")
    assert "Read-only file system" in written.stderr or "Permission denied" in written.stderr


def expect_stop(docker: Engine, name: str) -> None:
    """It ends by itself when it is asked to, as the signal says, with nothing left to kill."""
    assert docker.run("stop", "--time", "60", name).returncode == 0
    state = inspect(docker, name)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (143, False)
