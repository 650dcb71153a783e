"""How fast this machine reads memory: the ceiling of decode, which reads the weights once for every token.

glibc's memchr, looking for a byte that is not there, reads a buffer from end to end with the widest loads that the
processor has; ctypes lets go of Python's lock meanwhile, so that one thread per core reads its own part.
"""

import ctypes
import mmap
import threading
import time

from . import probe

_MOST_BYTES = 512 << 20
"""Beyond the last-level cache of anything that is no server."""
_SHARE_OF_FREE = 8
_ROUNDS = 5


def read_gb_per_s(threads: int) -> float | None:
    """The best of five rounds, in 10⁹ bytes a second; None where there is no memory to spare, or no memchr."""
    free = probe.memory_available_bytes()
    part = min(_MOST_BYTES, free // _SHARE_OF_FREE) // threads // mmap.PAGESIZE * mmap.PAGESIZE
    if part < 8 << 20:
        return None
    try:
        memchr = ctypes.CDLL(None).memchr
    except (OSError, AttributeError):
        return None
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    buffers = [mmap.mmap(-1, part) for _ in range(threads)]
    starts = [ctypes.c_char.from_buffer(buffer) for buffer in buffers]
    try:
        addresses = [ctypes.addressof(start) for start in starts]
        for address in addresses:
            ctypes.memset(address, 1, part)  # untouched pages would all be one page of zeros
        return part * threads / min(_round_s(memchr, addresses, part) for _ in range(_ROUNDS)) / 1e9
    finally:
        del starts[:]
        for buffer in buffers:
            buffer.close()


def _round_s(memchr: "ctypes._NamedFuncPointer", addresses: list[int], size: int) -> float:
    """Seconds from the first thread's start to the last one's end."""
    begin = threading.Barrier(len(addresses) + 1)

    def read(address: int) -> None:
        begin.wait()
        memchr(address, 2, size)

    readers = [threading.Thread(target=read, args=(address,)) for address in addresses]
    for reader in readers:
        reader.start()
    begin.wait()
    start_s = time.perf_counter()
    for reader in readers:
        reader.join()
    return time.perf_counter() - start_s
