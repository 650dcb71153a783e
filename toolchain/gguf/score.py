"""llama.cpp inside this process: its tokenizer, and its log-probabilities of given answers.

The ctypes bindings come from the pinned build itself, so the structures they describe are those of its libraries.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.data.rows import Row
from toolchain.errors import HostError, ModelError
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores

_BATCH = 512
"""Tokens per llama_decode call: llama.cpp's own n_ubatch."""

_loaded: dict[Path, ModuleType] = {}
_keep_alive: list[object] = []
"""The log callback, which C code holds."""

_GGML_LOG_LEVEL_ERROR = 4
_errors: list[str] = []
"""What llama.cpp last complained of."""


def answer_logprobs(
    gguf: Path, rows: Sequence[Row], *, llama: LlamaCpp, threads: int | None = None
) -> Iterator[npt.NDArray[np.float32]]:
    """For each row, log-softmax of the logits that predict its answer: float32 [len(answer_ids), vocabulary].

    Runs on the processor with llama.cpp's default key-value cache (16-bit), one row at a time, the cache cleared
    before each. `threads` None: physical cores. Raises ModelError.
    """
    if rows:
        with open_model(gguf, llama=llama) as model:
            yield from logprobs_of(model, rows, gguf=gguf, llama=llama, threads=threads)


def logprobs_of(
    model: Any,
    rows: Sequence[Row],
    *,
    gguf: Path,
    llama: LlamaCpp,
    threads: int | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """The same from a model of `open_model`; at least one row."""
    for row in rows:
        if not row.prompt_ids:
            raise ModelError(f"row {row.id}: an empty prompt, so nothing predicts its first answer token")
    lib = bindings(llama)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    highest = max(max(row.token_ids) for row in rows)
    if highest >= vocabulary:
        raise ModelError(f"{gguf}: {vocabulary} tokens, a row has token {highest}: another tokenizer's")
    params = lib.llama_context_default_params()
    params.n_ctx = max(len(row.token_ids) for row in rows)
    params.n_batch = params.n_ubatch = min(_BATCH, params.n_ctx)
    params.n_threads = params.n_threads_batch = threads or physical_cores()
    params.no_perf = True
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise ModelError(f"{gguf}: llama.cpp cannot open a context of {params.n_ctx} tokens")
    batch = lib.llama_batch_init(_BATCH, 0, 1)
    try:
        for row in rows:
            yield _score(row, lib=lib, context=context, batch=batch, vocabulary=vocabulary, gguf=gguf)
    finally:
        lib.llama_batch_free(batch)
        lib.llama_free(context)


def _score(
    row: Row, *, lib: ModuleType, context: Any, batch: Any, vocabulary: int, gguf: Path
) -> npt.NDArray[np.float32]:
    # The last answer token predicts nothing that is asked for.
    tokens = row.token_ids[:-1]
    first = len(row.prompt_ids) - 1
    logits = np.empty((len(row.answer_ids), vocabulary), dtype=np.float32)
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    done = 0
    for start in range(0, len(tokens), _BATCH):
        part = tokens[start : start + _BATCH]
        batch.n_tokens = len(part)
        wanted = 0
        for i, token in enumerate(part):
            batch.token[i] = token
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = start + i >= first
            wanted += start + i >= first
        code = lib.llama_decode(context, batch)
        if code != 0:
            raise ModelError(f"{gguf}: llama_decode answered {code} at token {start} of row {row.id}")
        if wanted:
            found = np.ctypeslib.as_array(lib.llama_get_logits(context), shape=(wanted, vocabulary))
            logits[done : done + wanted] = found
            done += wanted
    return _log_softmax(logits)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """In place over the last axis; the sum is taken in double precision."""
    logits -= logits.max(axis=-1, keepdims=True)
    total = np.exp(logits).sum(axis=-1, keepdims=True, dtype=np.float64)
    logits -= np.log(total).astype(np.float32)
    return logits


class Vocabulary:
    """llama.cpp's own tokenizer of one GGUF."""

    def __init__(self, lib: ModuleType, model: Any) -> None:
        self._lib = lib
        self._vocab = lib.llama_model_get_vocab(model)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of `text`, special tokens in it recognised; `add_special` adds bos and eos as the GGUF says."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, True)
        if count < 0:
            raise ModelError(f"llama.cpp cannot tokenize {text[:80]!r} ({count})")
        return list(ids[:count])

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of an answer, without its special tokens, or with them spelled out."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        room = 16
        while True:
            text = ctypes.create_string_buffer(room)
            count = self._lib.llama_detokenize(self._vocab, tokens, len(ids), text, room, not special, special)
            if count >= 0:
                return text.raw[:count].decode("utf-8", "replace")
            room = -count

    def control_tokens(self) -> dict[int, str]:
        """Ids that llama.cpp reads as one token wherever their text stands, and that text: a GGUF's control tokens, and
        those of its vocabulary that look like one ("</s>"), whatever the GGUF says of them."""
        found = {}
        for token_id in range(self._lib.llama_vocab_n_tokens(self._vocab)):
            if self._lib.llama_vocab_is_control(self._vocab, token_id):
                found[token_id] = self._lib.llama_vocab_get_text(self._vocab, token_id).decode("utf-8", "replace")
        return found

    def ends_generation(self, token_id: int) -> bool:
        """Whether llama.cpp stops an answer at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token_id))


@contextmanager
def open_vocabulary(gguf: Path, *, llama: LlamaCpp) -> Iterator[Vocabulary]:
    """The tokenizer of `gguf` for the length of a `with` block; the weights are not read."""
    with open_model(gguf, llama=llama, vocabulary_only=True) as model:
        yield Vocabulary(bindings(llama), model)


@contextmanager
def open_model(
    gguf: Path, *, llama: LlamaCpp, vocabulary_only: bool = False, check: bool = False, mapped: bool = False
) -> Iterator[Any]:
    """A `llama_model *` on the processor for the length of a `with` block. Raises ModelError.

    `check` has llama.cpp look at every weight for NaN and infinity; `mapped` has it compute on the file's own pages.
    """
    lib = bindings(llama)
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocabulary_only
    params.check_tensors = check
    if mapped:
        params.load_mode, params.use_extra_bufts = lib.LLAMA_LOAD_MODE_MMAP, False
    _errors.clear()
    model = lib.llama_model_load_from_file(str(gguf).encode(), params)
    if not model:
        cause = "; ".join(_errors[:2]) or "no reason given"
        hint = "the file is damaged, or the pinned llama.cpp does not know such a model"
        if check:
            hint = (
                "a weight that is not finite, or too large for 16 bits, comes from the checkpoint: look at its training"
            )
        raise ModelError(f"{gguf}: llama.cpp cannot load it: {cause}", hint=hint)
    try:
        yield model
    finally:
        lib.llama_model_free(model)


def bindings(llama: LlamaCpp) -> ModuleType:
    """The ctypes module of this build, with its compute backends loaded and its log silenced. Raises HostError."""
    if llama.root in _loaded:
        return _loaded[llama.root]
    if _loaded or "llama_cpp" in sys.modules:
        raise HostError("another build of llama.cpp is already loaded in this process")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(llama.bin)
    # The package's own __init__ imports its high-level half and what that needs; the plain bindings suffice.
    package = ModuleType("llama_cpp")
    package.__path__ = [str(llama.bindings / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    try:
        lib = import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        del sys.modules["llama_cpp"]
        raise HostError(f"{llama.root}: cannot be loaded: {error}", hint="`toolchain llama-cpp build`") from error
    finally:
        del os.environ["LLAMA_CPP_LIB_PATH"]

    def on_log(level: int, text: bytes, data: object) -> None:
        if level == _GGML_LOG_LEVEL_ERROR:
            _errors.append(text.decode("utf-8", "replace").strip())

    callback = lib.llama_log_callback(on_log)
    _keep_alive.append(callback)
    lib.llama_log_set(callback, None)
    lib.llama_backend_init()
    ggml = ctypes.CDLL(str(llama.bin / "libggml.so"))
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_load_all_from_path(str(llama.bin).encode())
    _loaded[llama.root] = lib
    return lib
