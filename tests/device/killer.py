"""Run a bundle's edgectl, and kill it with SIGKILL before its n-th step that changes anything.

`python killer.py EDGECTL N ARGUMENT…`: N = 0 kills nothing and prints the steps, one a line, on stdout.
"""

import os
import runpy
import signal
import sys

_CHANGES = {
    "os.mkdir",
    "os.rename",
    "os.symlink",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "fcntl.flock",
    "shutil.rmtree",
    "subprocess.Popen",
    "os.fork",
    "os.kill",
}


def main(edgectl: str, kill_before: int, arguments: list[str]) -> None:
    steps: list[str] = []
    me = os.getpid()
    http = 0

    def watch(event: str, details: tuple[object, ...]) -> None:
        nonlocal http
        if os.getpid() != me:
            return  # between fork and exec
        if event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            step = f"open {details[0]}"
        elif event == "http.client.connect":
            http += 1
            step = f"ask {http}"
        elif event in _CHANGES:
            step = f"{event} {details[0] if details else ''}"
        else:
            return
        steps.append(step)
        if len(steps) == kill_before:
            os.kill(me, signal.SIGKILL)

    sys.argv = [edgectl, *arguments]
    sys.addaudithook(watch)
    try:
        runpy.run_path(edgectl, run_name="__main__")
    finally:
        if kill_before == 0:
            print("\n".join(steps), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
