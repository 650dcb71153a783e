"""What a GGUF file says about itself. Reads the header through a memory map; tensor data is measured, not read.

The gguf package gives the names and numbers; its reader makes an array of every token and merge, which takes seconds.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, Keys, LlamaFileType

from toolchain.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_AGAIN = "copy or make the file again"
_OTHER = "give a whole model's GGUF, as the converter or llama-quantize writes it"
_NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table."""

    name: str
    type: str
    """Such as "Q4_K" or "F16"."""
    shape: tuple[int, ...]
    """Row width first, as ggml counts."""
    bytes: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufFacts:
    """One GGUF file, as its header describes it. A key that the file lacks is None."""

    architecture: str
    name: str | None
    file_type: str | None
    """The quantization mix it is labelled with, such as "Q4_K_M"; the tensors may tell otherwise."""
    parameters: int
    tensor_bytes: int
    file_bytes: int
    bits_per_weight: float
    """tensor_bytes × 8 / parameters, of all tensors."""
    tensor_types: dict[str, int]
    """Number of tensors of each type."""
    context_length: int | None
    vocabulary_size: int
    """Entries of the token list: rows of the output, unused padding included."""
    tokenizer: str | None
    pre_tokenizer: str | None
    bos_id: int | None
    bos_token: str | None
    eos_id: int | None
    eos_token: str | None
    pad_id: int | None
    pad_token: str | None
    add_bos: bool | None
    """None leaves it to llama.cpp, which adds bos for SentencePiece vocabularies and not for others."""
    add_eos: bool | None
    missing_bytes: int | None
    """How many of the 256 bytes no token of a SentencePiece vocabulary stands for; None for other kinds. llama.cpp ends
    the process when it meets such a byte in a text."""
    chat_template: str | None
    chat_template_sha256: str | None
    """SHA-256 of the template's UTF-8 bytes, in hex."""
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Header:
    values: dict[str, Any]
    """Every key that is not a list."""
    tokens: list[bytes]
    tensors: tuple[Tensor, ...]


def read_facts(path: Path, *, vocabulary_only: bool = False) -> GgufFacts:
    """Facts of the GGUF at `path`, which has weights or, if `vocabulary_only`, none.

    Raises ModelError when it is missing, is no GGUF or is cut short.
    """
    header = _read(path)
    value, tensors = header.values.get, header.tensors
    architecture = value(Keys.General.ARCHITECTURE)
    if not isinstance(architecture, str):
        raise ModelError(f"{path}: no {Keys.General.ARCHITECTURE} in it: not a language model's GGUF", hint=_OTHER)
    if not tensors and not vocabulary_only:
        raise ModelError(f"{path}: no tensors in it: a vocabulary only?", hint=_OTHER)
    parameters = sum(tensor.elements for tensor in tensors)
    tensor_bytes = sum(tensor.bytes for tensor in tensors)

    def special(key: str) -> tuple[int | None, str | None]:
        token_id = value(key)
        if token_id is None or not 0 <= token_id < len(header.tokens):
            return token_id, None
        return token_id, header.tokens[token_id].decode("utf-8", "replace")

    bos_id, bos_token = special(Keys.Tokenizer.BOS_ID)
    eos_id, eos_token = special(Keys.Tokenizer.EOS_ID)
    pad_id, pad_token = special(Keys.Tokenizer.PAD_ID)
    template = value(Keys.Tokenizer.CHAT_TEMPLATE)
    label = value(Keys.General.FILE_TYPE)
    return GgufFacts(
        architecture=architecture,
        name=value(Keys.General.NAME),
        file_type=None if label is None else _file_type(int(label)),
        parameters=parameters,
        tensor_bytes=tensor_bytes,
        file_bytes=path.stat().st_size,
        bits_per_weight=tensor_bytes * 8 / parameters if tensors else 0.0,
        tensor_types=dict(sorted(Counter(tensor.type for tensor in tensors).items())),
        context_length=value(Keys.LLM.CONTEXT_LENGTH.format(arch=architecture)),
        vocabulary_size=len(header.tokens),
        tokenizer=value(Keys.Tokenizer.MODEL),
        pre_tokenizer=value(Keys.Tokenizer.PRE),
        bos_id=bos_id,
        bos_token=bos_token,
        eos_id=eos_id,
        eos_token=eos_token,
        pad_id=pad_id,
        pad_token=pad_token,
        add_bos=value(Keys.Tokenizer.ADD_BOS),
        add_eos=value(Keys.Tokenizer.ADD_EOS),
        missing_bytes=_missing_bytes(value(Keys.Tokenizer.MODEL), header.tokens),
        chat_template=template,
        chat_template_sha256=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        tensors=tensors,
    )


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the GGUF at `path` but its lists, with its value. Raises ModelError."""
    return _read(path).values


class _Cursor:
    """A place in the header that moves on as it is read, and knows where the file ends."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.at = 0

    def skip(self, count: int, what: str) -> int:
        """Move on by `count` bytes; returns where they start."""
        start, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise self.cut(what, self.at)
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self._data, self.skip(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> bytes:
        count = self.number("Q", what)
        start = self.skip(count, what)
        return self._data[start : start + count]

    def cut(self, what: str, end: int) -> ModelError:
        return ModelError(
            f"{self._path}: cut short: {what} ends at byte {end:,}, the file has {len(self._data):,}",
            hint=_AGAIN,
        )


def _read(path: Path) -> _Header:
    """The whole header, checked against the size of the file."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != _MAGIC:
                raise ModelError(f"{path}: not a GGUF: starts with {magic!r}, expected {_MAGIC!r}", hint=_OTHER)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(path: Path, data: mmap.mmap) -> _Header:
    cursor = _Cursor(path, data)
    cursor.skip(len(_MAGIC), "the magic number")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        raise ModelError(f"{path}: GGUF version {version}; versions {_VERSIONS} are known", hint=_AGAIN)
    tensor_count = cursor.number("Q", "the number of tensors")
    values: dict[str, Any] = {}
    tokens: list[bytes] = []
    try:
        for i in range(cursor.number("Q", "the number of keys")):
            key = cursor.string(f"key {i}").decode()
            kind = GGUFValueType(cursor.number("I", key))
            if kind == GGUFValueType.ARRAY:
                found = _list(cursor, key)
                if key == Keys.Tokenizer.LIST:
                    tokens = found
            elif kind == GGUFValueType.STRING:
                values[key] = cursor.string(key).decode("utf-8", "replace")
            else:
                values[key] = cursor.number(_NUMBERS[kind], key)
        entries = []
        for i in range(tensor_count):
            name = cursor.string(f"tensor {i}").decode()
            shape = tuple(cursor.number("Q", name) for _ in range(cursor.number("I", name)))
            kind = GGMLQuantizationType(cursor.number("I", name))
            entries.append((Tensor(name, kind.name, shape, _tensor_bytes(kind, shape)), cursor.number("Q", name)))
    except ValueError as error:  # a type number that the format does not have, or a name that is not UTF-8
        raise ModelError(f"{path}: damaged near byte {cursor.at:,}: {error}", hint=_AGAIN) from None
    alignment = values.get(Keys.General.ALIGNMENT, _ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    for tensor, offset in entries:
        end = start + offset + tensor.bytes
        if end > len(data):
            raise cursor.cut(f"tensor {tensor.name}", end)
    return _Header(values, tokens, tuple(tensor for tensor, _ in entries))


def _list(cursor: _Cursor, key: str) -> list[bytes]:
    """Read past a list; returns its items when they are strings."""
    kind = GGUFValueType(cursor.number("I", key))
    count = cursor.number("Q", key)
    if kind == GGUFValueType.STRING:
        return [cursor.string(key) for _ in range(count)]
    if kind == GGUFValueType.ARRAY:
        for _ in range(count):
            _list(cursor, key)
    else:
        cursor.skip(count * struct.calcsize("<" + _NUMBERS[kind]), key)
    return []


def _missing_bytes(tokenizer: str | None, tokens: list[bytes]) -> int | None:
    """Bytes that llama_vocab::byte_to_token would not find in a SentencePiece vocabulary: as <0x41> or as itself."""
    if tokenizer != "llama":
        return None
    have = set(tokens)
    return sum(b"<0x%02X>" % byte not in have and bytes([byte]) not in have for byte in range(256))


def _tensor_bytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(prod(shape) // block * size)


def _file_type(label: int) -> str:
    try:
        name = LlamaFileType(label).name
    except ValueError:
        return f"unknown ({label})"
    return str(name).removeprefix("MOSTLY_").removeprefix("ALL_")
