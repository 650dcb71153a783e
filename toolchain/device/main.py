"""What `./edgectl` calls: the server's start at once, other verbs by cli.py; errors and signals become exit codes."""

from __future__ import annotations

import sys

from . import launch
from .errors import DeviceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


class _TerminatedError(Exception):
    """SIGTERM, or the terminal is gone."""


def main(root: str, arguments: list[str]) -> int:
    """Run one verb on the bundle at `root`; the exit code."""
    try:
        code = _run(root, arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except DeviceError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except KeyError as error:
        return _fail(f"the bundle's JSON files lack the key {error}", "./edgectl verify says which file was changed")
    except KeyboardInterrupt:
        return 130
    except _TerminatedError:
        return 143
    except BrokenPipeError:
        # The reader of our output has gone (`| head`).
        _drop_output()
        return 1
    except OSError as error:
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}")
        _drop_output()
        return _fail(f"the output cannot be written: {error.strerror}")


def _run(root: str, arguments: list[str]) -> int:
    launched = launch.launch(root, arguments)
    _heed_signals()
    if launched is None:
        from . import cli

        return cli.run(root, arguments)
    launch.give_way(launched.child)
    from . import serve

    serve.go_on(launched, say, tell if launched.options.json else serve.nobody)
    return 0


def _fail(message: str, hint: str | None = None, code: int = 1) -> int:
    say(f"error: {message}")
    if hint:
        say(f"hint: {hint}")
    return code


def _drop_output() -> None:
    """What is left of it would be tried again when Python ends, and fail again."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say(line: str) -> None:
    """A line of progress. Nobody may be listening any more: nothing is broken off for that."""
    if sys.stderr is None:  # closed: print would take stdout
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def tell(event: dict[str, object]) -> None:
    """An event as a line of JSON; as with `say`, nobody may be listening any more."""
    import json

    try:
        print(json.dumps(event), flush=True)
    except (OSError, ValueError):
        _drop_output()


def _heed_signals() -> None:
    # A server that was started before this dies with us (launch.py).
    import signal

    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _TerminatedError
