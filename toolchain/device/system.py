"""Where facts about the machine are read: files below a root, and programs. Tests give other answers by a subclass."""

import ctypes
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import meter
from .facts import FactError, Files

_PROGRAM_TIMEOUT_S = 10.0
_METERED_S = 1.0
_SYSTEM_PROGRAMS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where nvpmodel and vcgencmd lie: a user's PATH may leave out sbin, and may lead elsewhere."""


@dataclass(frozen=True)
class System(Files):
    """This machine. Paths are given as they are on it, and read below `root`."""

    root: Path = Path("/")

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

    def _at(self, path: str) -> str:
        return str(self.root / path.lstrip("/"))


HERE = System()
