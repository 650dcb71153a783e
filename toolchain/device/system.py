"""Where facts about the machine are read: files below a root, and programs. Tests give other answers by a subclass."""

import ctypes
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import meter

_PROGRAM_TIMEOUT_S = 10.0
_METERED_S = 1.0
_SYSTEM_PROGRAMS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where nvpmodel and vcgencmd lie: a user's PATH may leave out sbin, and may lead elsewhere."""


class FactError(Exception):
    """A fact that should be there and cannot be read: the reason, and what helps."""

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class System:
    """This machine. Paths are given as they are on it, and read below `root`."""

    root: Path = Path("/")

    def exists(self, path: str) -> bool:
        return self._place(path).exists()

    def read(self, path: str) -> str | None:
        """A file's text, stripped; None when there is no such file. Raises FactError when it is closed to us."""
        try:
            return self._place(path).read_text(encoding="utf-8", errors="replace").strip("\0 \n")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise FactError(f"{path} cannot be read: {error.strerror}") from None

    def number(self, path: str) -> int | None:
        """A file that holds one whole number; None when there is none. Raises FactError."""
        text = self.read(path)
        return None if text is None else parse_int(text, path)

    def text(self, path: str) -> str | None:
        """A file's text; None also when it is empty or cannot be read."""
        try:
            return self.read(path) or None
        except FactError:
            return None

    def glob(self, pattern: str) -> list[str]:
        """Paths on this machine that match, sorted."""
        found = self.root.glob(pattern.lstrip("/"))
        return sorted(f"/{path.relative_to(self.root)}" for path in found)

    def run(self, argv: Sequence[str]) -> str | None:
        """What a program of the system says; None when it is not there, fails, or takes too long."""
        try:
            done = subprocess.run(
                argv,
                env={"PATH": _SYSTEM_PROGRAMS, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PROGRAM_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def cuda_driver(self) -> int | None:
        """The newest CUDA that the driver offers, 1000 × major + 10 × minor; None without a driver that answers."""
        version = ctypes.c_int()
        try:
            code = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        except (OSError, AttributeError):
            return None
        return version.value or None if code == 0 else None

    def free_bytes(self, folder: Path) -> int:
        """Room on the disk of `folder` for one who is not root. Raises FactError."""
        try:
            return shutil.disk_usage(folder).free
        except OSError as error:
            raise FactError(f"the disk of {folder} does not say: {error.strerror}") from None

    def foreign_share(self) -> float:
        """Share of all processors that other programs use, over one second. Raises FactError."""
        try:
            with meter.ForeignCpu() as foreign:
                time.sleep(_METERED_S)
        except (OSError, ValueError, IndexError) as error:
            raise FactError(f"/proc/stat cannot be read: {error}") from None
        return foreign.share

    def year(self) -> int:
        return time.gmtime().tm_year

    def _place(self, path: str) -> Path:
        return self.root / path.lstrip("/")


HERE = System()


def parse_int(text: str, source: str) -> int:
    """The whole number that `source` says. Raises FactError."""
    try:
        return int(text)
    except ValueError:
        raise FactError(f"{source} says {text[:60]!r}, which is no number") from None
