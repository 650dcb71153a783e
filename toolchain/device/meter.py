"""Who else used the processor while we measured; what a process takes of memory; what of a file is in memory."""

import ctypes
import mmap
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

MAX_FOREIGN_SHARE = 0.05
"""Of all processors: when other programs use more, figures are not the bundle's own."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_DONTNEED = os.POSIX_FADV_DONTNEED


class ForeignCpu:
    """Processor time of the whole machine less that of this process and its children, over a `with` block.

    `share` is of all the machine's processors together, 0 to 1; time stolen by a hypervisor counts as foreign. The
    kernel counts in ticks of 10 ms on most machines: a block shorter than a second says little.
    """

    share: float

    def __enter__(self) -> "ForeignCpu":
        self._start = (time.perf_counter(), _busy_s(), _own_s())
        return self

    def __exit__(self, *_: object) -> None:
        start_s, busy_s, own_s = self._start
        elapsed_s = time.perf_counter() - start_s
        foreign_s = (_busy_s() - busy_s) - (_own_s() - own_s)
        # The kernel counts in ticks: a second may hold a thousandth more of them.
        self.share = min(1.0, max(0.0, foreign_s) / (elapsed_s * (os.cpu_count() or 1)))


def _busy_s() -> float:
    """Seconds that all processors together were not idle since boot."""
    values = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = values[:8]
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def _own_s() -> float:
    """Processor seconds of this process, of its children alive and of those it has waited for."""
    parent_of: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text(errors="replace")
            except OSError:
                continue  # it ended between the two reads
            fields = text.rpartition(")")[2].split()
            parent_of[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = sum(int(value) for value in fields[11:15])
    ours = {os.getpid()}
    while more := {pid for pid, parent in parent_of.items() if parent in ours and pid not in ours}:
        ours |= more
    return sum(ticks.get(pid, 0) for pid in ours) / _TICKS_PER_S


def memory_bytes(pid: int) -> dict[str, int | None]:
    """Peak resident set (VmHWM) and proportional set size of a process; None where the kernel does not say."""
    return {
        "peak_rss_bytes": _kib(Path(f"/proc/{pid}/status"), "VmHWM"),
        "pss_bytes": _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss"),
    }


def major_faults(pid: int) -> int | None:
    """Pages that the process had to read from the disk, since its start; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[9])


def _kib(path: Path, key: str) -> int | None:
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def evict(paths: Iterable[Path]) -> None:
    """Ask Linux to drop the files' pages from the page cache. It may not: see `resident_share`."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page not yet written cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, _DONTNEED)
        finally:
            os.close(descriptor)


def load(paths: Iterable[Path]) -> None:
    """Read the files once, so that their pages are in the page cache."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass


def resident_share(paths: Iterable[Path]) -> float | None:
    """Share of the files' pages that is in memory, by mincore(2); None when the kernel does not answer.

    Linux tells the truth only to one who may write the file, and calls all pages resident to others: never a wrong
    claim of an eviction.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    page = os.sysconf("SC_PAGE_SIZE")
    resident = total = 0
    for path in paths:
        size = path.stat().st_size
        if size == 0:
            continue
        count = -(-size // page)
        flags = (ctypes.c_ubyte * count)()
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            # A private writable mapping, because ctypes takes the address of writable buffers only; nothing is written.
            start = ctypes.c_char.from_buffer(mapped)
            code = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), flags)
            del start
            if code != 0:
                return None
        resident += sum(flag & 1 for flag in flags)
        total += count
    return resident / total if total else None
