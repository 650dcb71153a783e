"""A 16-bit GGUF that llama.cpp has open, with weights that can be exchanged in memory, and its KL to what it was.

llama.cpp computes on the pages of the file that it has mapped. Here these pages are mapped once more at the same
address, copy-on-write: what is written to them changes what llama.cpp computes and never the file, and only what is
changed takes memory. So one form after another can be scored without writing or loading a model, whatever its
architecture.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from toolchain.data.rows import Row
from toolchain.errors import HostError, ModelError
from toolchain.evaluate.divergence import Reference
from toolchain.gguf import score
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores

Floats = npt.NDArray[np.float32]
T = TypeVar("T")
_BATCH = 256
"""Tokens that are scored at once."""
_SIDE_BY_SIDE = 4
"""Most batches that are scored at the same time."""
_MAP_FIXED = 0x10
_DTYPES: dict[str, Any] = {"F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class _Mapped:
    """A range of the file in this process."""

    address: int
    size: int
    offset: int


class Overlay:
    """The tensors of one open GGUF. `with open_overlay(…) as overlay`."""

    def __init__(self, gguf: Path, model: Any, mapped: Sequence[_Mapped]) -> None:
        self.gguf, self.model = gguf, model
        self._mapped = mapped
        self._tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
        self._changed: set[str] = set()

    def shape(self, name: str) -> tuple[int, int]:
        """Rows, those of all experts together, and their width."""
        data = self._tensors[name].data
        return data.size // data.shape[-1], int(data.shape[-1])

    def original(self, name: str, part: slice = slice(None)) -> Floats:
        """These rows as the file has them: float32 [rows, width]."""
        rows, width = self.shape(name)
        return np.ascontiguousarray(self._tensors[name].data.reshape(rows, width)[part], np.float32)

    def write(self, name: str, weights: Floats, part: slice = slice(None)) -> None:
        """Compute with these rows from now on, float32 [rows, width], rounded to the tensor's own 16 bits."""
        view = self._view(name)
        view[part] = weights.astype(view.dtype)
        self._changed.add(name)

    def restore(self, name: str) -> None:
        """Compute with the file's weights again."""
        if name in self._changed:
            self._view(name)[:] = self._tensors[name].data.reshape(self.shape(name))
            self._changed.discard(name)

    def _view(self, name: str) -> npt.NDArray[Any]:
        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        if kind not in _DTYPES:
            raise ModelError(f"{self.gguf}: {name} is {kind}: only F16 and F32 can be exchanged")
        start, size = int(tensor.data_offset), int(tensor.n_bytes)
        for part in self._mapped:
            if part.offset <= start and start + size <= part.offset + part.size:
                raw = (ctypes.c_uint8 * size).from_address(part.address + start - part.offset)
                view: npt.NDArray[Any] = np.ctypeslib.as_array(raw).view(_DTYPES[kind])
                return view.reshape(self.shape(name))
        raise HostError(f"{self.gguf}: {name} is not mapped by llama.cpp")


@contextmanager
def open_overlay(gguf: Path, *, llama: LlamaCpp) -> Iterator[Overlay]:
    """Raises ModelError, HostError."""
    before = _mappings(gguf)
    with score.open_model(gguf, llama=llama, mapped=True) as model:
        own = [part for part in _mappings(gguf) if part not in before]
        if not own:
            raise HostError(f"{gguf}: llama.cpp has not mapped it into memory")
        _make_private(gguf, own)
        yield Overlay(gguf, model, own)


def _mappings(gguf: Path) -> list[_Mapped]:
    """Where this process has the file mapped, by Linux's account."""
    own = str(gguf.resolve())
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        # By name: on overlay and btrfs file systems, device and inode are not those that stat tells.
        span, _, offset, _, _, *name = line.split(maxsplit=5)
        if name == [own]:
            start, end = (int(part, 16) for part in span.split("-"))
            found.append(_Mapped(start, end - start, int(offset, 16)))
    return found


def _make_private(gguf: Path, mapped: Sequence[_Mapped]) -> None:
    """Lay private, writable pages of the file over these. Raises HostError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    rights, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    with gguf.open("rb") as file:
        for part in mapped:
            if libc.mmap(part.address, part.size, rights, flags, file.fileno(), part.offset) != part.address:
                raise HostError(f"{gguf}: cannot be mapped anew: {os.strerror(ctypes.get_errno())}")


class Divergence:
    """KL(first state ‖ present state) of an overlay's model over the answers of some rows, in nats per answer token.

    Batches are scored side by side, each on few threads: threads of one llama_decode wait for each other without
    letting go of their core, and where other work shares the cores, two of them took twice the time of one.
    """

    def __init__(self, overlay: Overlay, rows: Sequence[Row], *, llama: LlamaCpp, threads: int | None = None) -> None:
        """Scores the present state as the reference: rows' answer tokens × vocabulary × 4 bytes of memory."""
        self._lib, self._gguf = score.bindings(llama), overlay.gguf
        self._batches = _pack(rows)
        lib, cores = self._lib, threads or physical_cores()
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(overlay.model))
        side_by_side = min(cores, _SIDE_BY_SIDE)
        params = lib.llama_context_default_params()
        most = max(sum(len(row.token_ids) for row in batch) for batch in self._batches)
        params.n_ctx = params.n_batch = params.n_ubatch = most
        params.n_seq_max = max(len(batch) for batch in self._batches)
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = cores // side_by_side
        params.no_perf = True
        self._pool = ThreadPoolExecutor(side_by_side)
        self._open: list[tuple[Any, Any]] = []
        self._idle: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        for _ in range(side_by_side):
            context = lib.llama_init_from_model(overlay.model, params)
            if not context:
                self.close()
                raise ModelError(f"{self._gguf}: llama.cpp cannot open a context of {most} tokens")
            self._open.append((context, lib.llama_batch_init(most, 0, 1)))
            self._idle.put(self._open[-1])
        self._reference = self._each(range(self.batches), lambda _, logits: Reference(logits))

    @property
    def batches(self) -> int:
        return len(self._batches)

    def row_lengths(self, part: slice = slice(None)) -> list[int]:
        """Answer tokens of each row of these batches."""
        return [len(row.answer_ids) for batch in self._batches[part] for row in batch]

    def measure(self, part: slice = slice(None)) -> npt.NDArray[np.float64]:
        """KL at each answer position of these batches, row after row."""
        return np.concatenate(self._each(range(self.batches)[part], lambda at, logits: self._reference[at].kl(logits)))

    def close(self) -> None:
        self._pool.shutdown()
        for context, batch in self._open:
            self._lib.llama_batch_free(batch)
            self._lib.llama_free(context)

    def _each(self, wanted: Sequence[int], use: Callable[[int, Floats], T]) -> list[T]:
        """`use` of each of these batches and its logits, which it may write to."""

        def one(at: int) -> T:
            own = self._idle.get()
            try:
                return use(at, self._logits(self._batches[at], *own))
            finally:
                self._idle.put(own)

        return list(self._pool.map(one, wanted))

    def _logits(self, rows: Sequence[Row], context: Any, batch: Any) -> Floats:
        """[answer positions, vocabulary]; gone with the next batch in this context."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        at = wanted = 0
        for sequence, row in enumerate(rows):
            first = len(row.prompt_ids) - 1
            # The last answer token predicts nothing that is asked for.
            for position, token in enumerate(row.token_ids[:-1]):
                batch.token[at], batch.pos[at] = token, position
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = position >= first
                wanted += position >= first
                at += 1
        batch.n_tokens = at
        code = lib.llama_decode(context, batch)
        if code != 0:
            raise ModelError(f"{self._gguf}: llama_decode answered {code} for {at} tokens")
        return np.ctypeslib.as_array(lib.llama_get_logits(context), shape=(wanted, self._vocabulary))


def _pack(rows: Sequence[Row]) -> list[list[Row]]:
    """Batches of at most 256 tokens, or of one longer row, in the order of the rows: the first ones are a sample."""
    batches: list[list[Row]] = []
    room = 0
    for row in rows:
        if len(row.token_ids) > room:
            batches.append([])
            room = max(_BATCH, len(row.token_ids))
        batches[-1].append(row)
        room -= len(row.token_ids)
    return batches
