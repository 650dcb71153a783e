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
        launched = launch.launch(root, arguments)
        _heed_signals()
        if launched is None:
            from . import cli

            return cli.run(root, arguments)
        launch.give_way(launched.child)
        from . import serve

        serve.go_on(launched, say)
        return 0
    except DeviceError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyError as error:
        print(f"error: the bundle's JSON files lack the key {error}", file=sys.stderr)
        print("hint: ./edgectl verify says which file was changed", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except _TerminatedError:
        return 143
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1


def say(line: str) -> None:
    """A line of progress. Nobody may be listening any more: nothing is broken off for that."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def _heed_signals() -> None:
    # A server that was started before this dies with us (launch.py).
    import signal

    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _TerminatedError
