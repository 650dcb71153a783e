"""Run a bundle's edgectl, and kill it with SIGKILL before one of the steps that change anything.

`python killer.py EDGECTL STEP ARGUMENT…`: an empty STEP kills nothing; then the steps are printed, one a line.
"""

import os
import runpy
import signal
import sys
from collections import Counter

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


def main(edgectl: str, kill_before: str, arguments: list[str]) -> None:
    steps: list[str] = []
    seen: Counter[str] = Counter()
    me = os.getpid()

    def watch(event: str, details: tuple[object, ...]) -> None:
        if os.getpid() != me:
            return  # between fork and exec
        if event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            step = f"open {details[0]}"
        elif event == "http.client.connect":
            step = "ask"
        elif event in _CHANGES:
            # Of a process that is another one each time, the signal.
            step = f"{event} {details[1] if event == 'os.kill' else details[0] if details else ''}"
        else:
            return
        seen[step] += 1
        step = f"{step} #{seen[step]}"
        steps.append(step)
        if step == kill_before:
            os.kill(me, signal.SIGKILL)

    sys.argv = [edgectl, *arguments]
    sys.addaudithook(watch)
    try:
        runpy.run_path(edgectl, run_name="__main__")
    finally:
        if not kill_before:
            print("\n".join(steps), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
