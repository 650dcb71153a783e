"""ggml's own quantizer in this process: what llama-quantize would write for a tensor, and what an engine would read.

Functions are those of ggml.h in the pinned build, called through ctypes; they let go of Python's lock, so rows are
quantized on several threads.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from toolchain.errors import ExternalToolError, ModelError
from toolchain.gguf.header import read_metadata
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores

Floats = npt.NDArray[np.float32]
_ROWS = 64
"""Rows that a thread takes at a time."""


def block_width(kind: str) -> int:
    """Weights of a row that one block of the type "Q4_K" or the like holds: rows must be a multiple of it."""
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0])


def row_bytes(kind: str, width: int) -> int:
    """Bytes of a row of `width` weights; `width` must be a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(width // block * size)


class Quantizer:
    """Quantizes rows as llama-quantize does, to the byte."""

    def __init__(self, llama: LlamaCpp, *, threads: int | None = None) -> None:
        library = ctypes.CDLL(str(llama.bin / "libggml-base.so"))
        self._chunk = library.ggml_quantize_chunk
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        self._chunk.restype = ctypes.c_size_t
        self._threads = threads or physical_cores()

    def quantize(self, kind: str, rows: Floats, importance: Floats | None) -> npt.NDArray[np.uint8]:
        """`rows` float32 [n, width] as blocks of `kind`: uint8 [n, bytes of a row].

        `importance`, float32 [width], weighs the squared error of each column; None: all alike. Raises
        ExternalToolError.
        """
        if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous:
            raise ValueError(f"rows: float32 [n, width] wanted, not {rows.dtype} {rows.shape}")
        if importance is not None and importance.shape != (rows.shape[1],):
            raise ValueError(f"importance: {importance.shape}, rows are {rows.shape[1]} wide")
        number, width = rows.shape
        size = row_bytes(kind, width)
        result = np.empty((number, size), np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)

        def part(start: int) -> None:
            taken = rows[start : start + _ROWS]
            written = self._chunk(
                GGMLQuantizationType[kind].value,
                taken.ctypes.data,
                result[start:].ctypes.data,
                0,
                len(taken),
                width,
                None if weights is None else weights.ctypes.data,
            )
            if written != len(taken) * size:
                raise ExternalToolError(f"ggml_quantize_chunk wrote {written} bytes, {len(taken) * size} were expected")

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(part, range(0, number, _ROWS)))
        return result

    @staticmethod
    def read(kind: str, blocks: npt.NDArray[np.uint8]) -> Floats:
        """Rows as an engine reads them: float32 [n, width]."""
        found: Floats = dequantize(blocks, GGMLQuantizationType[kind])
        return found.reshape(len(blocks), -1)

    def round_trip(self, kind: str, rows: Floats, importance: Floats | None) -> Floats:
        """`rows` as an engine reads them after they were quantized to `kind`."""
        return self.read(kind, self.quantize(kind, rows, importance))


def read_importance(path: Path) -> dict[str, Floats]:
    """Mean squared activation of each input column, by tensor name, as llama-quantize takes it from an imatrix file.

    For a tensor of several experts, [experts, width] joined to one row. Raises ModelError.
    """
    hint = "give a matrix of llama-imatrix (GGUF), or leave imatrix.file out: then it is computed"
    read_metadata(path)  # one that is cut or lies about its sizes is named before it is believed
    try:
        tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in GGUFReader(path).tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{path}: cannot be read as an importance matrix: {error}", hint=hint) from error
    found = {}
    for key, sums in tensors.items():
        name = key.removesuffix(".in_sum2")
        if name == key:
            continue
        counts = tensors.get(f"{name}.counts")
        if counts is None:
            raise ModelError(f"{path}: no counts for {name}: not an importance matrix of llama-imatrix", hint=hint)
        by_expert, seen = sums.reshape(counts.size, -1), counts.reshape(-1, 1)
        mean = np.where(seen > 0, by_expert / np.maximum(seen, 1), np.float32(1))
        found[name] = np.ascontiguousarray(mean.reshape(-1), np.float32)
    if not found:
        raise ModelError(f"{path}: no importance matrix in it", hint=hint)
    return found
