"""Prompts → answers by llama.cpp inside this process: many sequences in one context.

When a sequence ends, its place takes the next prompt (continuous batching). What a sequence says may differ by a
near-tie from what it says beside other neighbours, since the shape of a batch changes the order of sums.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain.data.answers import Candidate
from toolchain.data.rows import Finish, Row
from toolchain.errors import HostError, ModelError
from toolchain.gguf import score
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores
from toolchain.recipe import Generate
from toolchain.reporter import Reporter, bar
from toolchain.student import load
from toolchain.teacher.decode import Decoded, Sampling, draws, text_of
from toolchain.teacher.journal import Journal, Prompt, speed

_BATCH = 512
"""Tokens per llama_decode call: llama.cpp's own n_ubatch."""
_CELLS = 256
"""llama.cpp rounds the context of a sequence up to this many tokens."""


_GREEDY_BATCH = 16


@dataclass
class _Slot:
    """A sequence of the context and the prompt in it."""

    number: int
    prompt: Prompt
    chance: torch.Tensor
    read: int = 0
    """Prompt tokens that are in the cache."""
    answer: list[int] = field(default_factory=list)

    @property
    def pending(self) -> list[int]:
        """Tokens to be read next: what is left of the prompt, else the newest answer token."""
        return list(self.prompt.ids[self.read :]) if self.read < len(self.prompt.ids) else self.answer[-1:]


def answer(
    settings: Generate,
    prompts: Sequence[Prompt],
    *,
    gguf: Path,
    tokenizer: Path,
    llama: LlamaCpp,
    journal: Journal,
    report: Reporter,
    threads: int | None = None,
) -> dict[str, Any]:
    """Answer what the journal lacks. `tokenizer`: a folder with the Hugging Face form of the GGUF's own.

    Raises ModelError, and HostError when not even one sequence fits in memory.
    """
    spelling = load.load_tokenizer(tokenizer)
    resumed = len(journal.answers)
    missing = [prompt for prompt in prompts if prompt.number not in journal.answers]
    seconds, tokens, slots = 0.0, 0, 0
    with bar(report, "teacher answers", total=len(prompts), unit="answer") as task:
        task.advance(resumed)
        if missing:
            stops = load.stop_ids(tokenizer, spelling)
            decoder = _Decoder(settings, gguf, llama, threads or physical_cores(), stops, report)
            started = time.perf_counter()
            for prompt, (ids, finish) in decoder.answers(missing):
                journal.add({prompt.number: Candidate(text_of(spelling, ids), ids, finish)})
                tokens += len(ids)
                task.advance(1)
            seconds = time.perf_counter() - started
            slots = decoder.slots
    return {
        "engine": "llama.cpp",
        "device": "cpu",
        "decoding_batch_size": slots,
        **speed(answers=len(missing), tokens=tokens, seconds=seconds),
        "answers_resumed": resumed,
    }


def greedy_texts(gguf: Path, rows: Sequence[Row], *, llama: LlamaCpp, report: Reporter) -> list[str]:
    """What the model answers to each row's prompt, its likeliest token each time, in at most the row's own length."""
    prompts = [Prompt(at, row.id, row.messages, row.prompt_ids, len(row.answer_ids), 0) for at, row in enumerate(rows)]
    settings = Generate(sampling_temperature=0.0, batch_size=_GREEDY_BATCH)
    found: dict[int, tuple[int, ...]] = {}
    with bar(report, f"answers by {gguf.name}", total=len(rows), unit="answer") as task:
        for prompt, (ids, _) in _Decoder(settings, gguf, llama, physical_cores(), (), report).answers(prompts):
            found[prompt.number] = ids
            task.advance()
    with score.open_vocabulary(gguf, llama=llama) as vocabulary:
        return [vocabulary.decode(found[prompt.number]) for prompt in prompts]


class _Decoder:
    def __init__(
        self,
        settings: Generate,
        gguf: Path,
        llama: LlamaCpp,
        threads: int,
        stops: Sequence[int],
        report: Reporter,
    ) -> None:
        self._choose = Sampling(settings)
        self._gguf = gguf
        self._llama = llama
        self._threads = threads
        self._stops = stops
        self._report = report
        self._lib = score.bindings(llama)
        self.slots = settings.batch_size

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Decoded]]:
        """Each prompt with its answer, in the order in which they end."""
        lib = self._lib
        waiting = deque(prompts)
        with score.open_model(self._gguf, llama=self._llama) as model, self._context(model, prompts) as context:
            vocabulary = score.Vocabulary(lib, model)
            width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
            _check_ids(prompts, width, self._gguf)
            memory = lib.llama_get_memory(context)
            free = list(range(self.slots))
            busy: list[_Slot] = []
            batch = lib.llama_batch_init(_BATCH, 0, 1)
            try:
                while waiting or busy:
                    while waiting and free:
                        busy.append(_Slot(free.pop(), waiting[0], draws(waiting.popleft())))
                    for slot, token in self._step(context, batch, busy, width):
                        slot.answer.append(token)
                        ends = token in self._stops or vocabulary.ends_generation(token)
                        finish: Finish = "stop" if ends else "length"
                        if finish == "stop" or len(slot.answer) >= slot.prompt.limit:
                            busy.remove(slot)
                            free.append(slot.number)
                            lib.llama_memory_seq_rm(memory, slot.number, -1, -1)
                            yield slot.prompt, (tuple(slot.answer), finish)
            finally:
                lib.llama_batch_free(batch)

    @contextmanager
    def _context(self, model: Any, prompts: Sequence[Prompt]) -> Iterator[Any]:
        """A context with room for `slots` of the longest prompts; fewer slots where memory is too small for that."""
        lib = self._lib
        longest = max(len(prompt.ids) + prompt.limit for prompt in prompts)
        self.slots = min(self.slots, len(prompts), lib.llama_max_parallel_sequences())
        while True:
            params = lib.llama_context_default_params()
            params.n_seq_max = self.slots
            params.n_ctx = self.slots * (-(-longest // _CELLS) * _CELLS)
            params.n_batch = params.n_ubatch = _BATCH
            params.n_threads = params.n_threads_batch = self._threads
            params.kv_unified = False  # prompts share no long beginning: each attends to its own cells alone
            params.no_perf = True
            context = lib.llama_init_from_model(model, params)
            if context:
                break
            if self.slots == 1:
                raise HostError(
                    f"{self._gguf}: llama.cpp cannot open a context of {params.n_ctx} tokens",
                    hint="lower generate.max_new_tokens, or use a machine with more memory",
                )
            self.slots //= 2
            self._report.line(f"no memory for {self.slots * 2} answers at a time: going on with {self.slots}")
        try:
            yield context
        finally:
            lib.llama_free(context)

    def _step(self, context: Any, batch: Any, busy: Sequence[_Slot], width: int) -> list[tuple[_Slot, int]]:
        """One llama_decode over what the slots have pending; the next token of those whose prompt is read."""
        lib = self._lib
        batch.n_tokens = 0
        ready: list[tuple[_Slot, int]] = []
        # Answers first, so that none waits for the long prompts of others.
        for slot in sorted(busy, key=lambda slot: len(slot.pending)):
            part = slot.pending[: _BATCH - batch.n_tokens]
            start = slot.read + max(0, len(slot.answer) - 1)
            for position, token in enumerate(part, start=start):
                self._put(batch, slot.number, position, token)
            if slot.read < len(slot.prompt.ids):
                slot.read += len(part)
            if part and slot.read == len(slot.prompt.ids):
                batch.logits[batch.n_tokens - 1] = True
                ready.append((slot, batch.n_tokens - 1))
        code = lib.llama_decode(context, batch)
        if code != 0:
            raise ModelError(f"{self._gguf}: llama_decode answered {code}")
        if not ready:
            return []
        found = np.stack([np.ctypeslib.as_array(lib.llama_get_logits_ith(context, at), (width,)) for _, at in ready])
        slots = [slot for slot, _ in ready]
        chance = torch.stack([slot.chance[len(slot.answer)] for slot in slots])
        seen = self._choose.seen(len(slots), width, torch.device("cpu"))
        if seen is not None:
            for row, slot in enumerate(slots):
                seen[row, [*slot.prompt.ids, *slot.answer]] = True
        chosen = self._choose(torch.from_numpy(found), seen, chance).tolist()
        return list(zip(slots, chosen, strict=True))

    @staticmethod
    def _put(batch: Any, sequence: int, position: int, token: int) -> None:
        at = batch.n_tokens
        batch.token[at] = token
        batch.pos[at] = position
        batch.n_seq_id[at] = 1
        batch.seq_id[at][0] = sequence
        batch.logits[at] = False
        batch.n_tokens = at + 1


def _check_ids(prompts: Sequence[Prompt], width: int, gguf: Path) -> None:
    for prompt in prompts:
        if not prompt.ids or max(prompt.ids) >= width:
            raise ModelError(f"{prompt.where}: {gguf} has {width} tokens, and the prompt is empty or has others")
