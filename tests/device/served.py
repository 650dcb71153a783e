"""`edgectl serve` as a process whose log goes to a file, and what it and its llama-server use."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from toolchain.device import serve

_PYTHON = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
_LOGGED_S = 60.0
_SETTLE_S = 30.0


@dataclass
class Served:
    """A running `edgectl serve`."""

    child: "subprocess.Popen[bytes]"
    port: int
    log_file: Path

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def server_pid(self) -> int:
        """Of llama-server now; 0 while there is none."""
        children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def wait_ready(self, times: int = 1) -> None:
        """Until it has become ready so often."""
        self.wait_logged("ready after", times)

    def wait_logged(self, text: str, times: int = 1) -> None:
        """Until the log has `text` so often: llama-server's own lines are written by a thread, later."""
        end_s = time.monotonic() + _LOGGED_S
        while self.log().count(text) < times:
            if self.child.poll() is not None or time.monotonic() > end_s:
                raise AssertionError(f"no {text!r}, exit code {self.child.returncode}: {self.log()[-2000:]}")
            time.sleep(0.02)

    def usage(self) -> dict[str, int]:
        """Memory, threads and descriptors of edgectl and llama-server together."""
        found = {"rss_kib": 0, "threads": 0, "descriptors": 0}
        for pid in (self.child.pid, self.server_pid()):
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            found["rss_kib"] += int(lines["VmRSS"].split()[0])
            found["threads"] += int(lines["Threads"])
            found["descriptors"] += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return found

    def settled(self, threads: int, descriptors: int) -> dict[str, int]:
        """What is used once threads and descriptors are back to so many; else what is used after half a minute."""
        end_s = time.monotonic() + _SETTLE_S
        while True:
            found = self.usage()
            back = found["threads"] <= threads and found["descriptors"] <= descriptors
            if back or time.monotonic() > end_s:
                return found
            time.sleep(0.2)


@contextmanager
def serving(bundle: Path, log: Path, *arguments: str, files: int | None = None, **environment: str) -> Iterator[Served]:
    """A bundle served on a free port, once it answers; `files`: how many descriptors a process may have."""
    port = serve.free_port()
    argv = [_PYTHON, "-I", "-S", str(bundle / "edgectl"), "serve", "--port", str(port), *arguments]
    if files is not None:
        argv = ["prlimit", f"--nofile={files}", *argv]
    with log.open("wb") as stderr:
        environ = {"PATH": "/usr/bin:/bin", **environment}
        child = subprocess.Popen(argv, cwd="/", env=environ, stdin=subprocess.DEVNULL, stderr=stderr)
    served = Served(child, port, log)
    try:
        served.wait_ready()
        yield served
    finally:
        child.kill()
        child.wait()
