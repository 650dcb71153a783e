"""Prompts → answers by a checkpoint in Transformers, many at a time.

Batches are formed once, by prompt length, and a prompt has its own random draws: a resumed run asks what is missing and
gets the same answers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from toolchain.data.answers import Candidate
from toolchain.data.rows import Finish
from toolchain.errors import HostError, ModelError
from toolchain.recipe import Generate
from toolchain.reporter import Reporter, bar
from toolchain.student import load, precision
from toolchain.teacher.journal import Journal, Prompt, speed

Decoded = tuple[tuple[int, ...], Finish]
"""Answer tokens with the eos that ended them, and how they ended."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits [rows, vocabulary]."""

    settings: Generate

    def __call__(self, logits: torch.Tensor, seen: torch.Tensor | None, draw: torch.Tensor) -> torch.Tensor:
        """Token ids [rows]. `seen`, bool like `logits`: tokens so far, for the penalty; `draw`: [rows] in [0, 1)."""
        if bool(logits.isnan().any()):
            raise ModelError("the teacher's logits are not finite", hint="its weights are damaged or overflow 16 bits")
        penalty = self.settings.repetition_penalty
        if seen is not None:
            # Keskar et al. 2019 (CTRL), in the form that keeps the sign: positive logits shrink, negative ones grow.
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.settings.sampling_temperature == 0:
            return logits.argmax(-1)
        p = (logits.double() / self.settings.sampling_temperature).softmax(-1)
        if self.settings.sampling_top_p < 1:
            ordered = p.sort(descending=True).values
            # A token stays while those before it hold less than top_p, so that the first always does.
            kept = (ordered.cumsum(-1) - ordered < self.settings.sampling_top_p).sum(-1, keepdim=True)
            p = p.where(p >= ordered.gather(-1, kept - 1), 0.0)
        # Inverse transform sampling in the order of ids: rounding moves a border a little, and swaps no two tokens.
        below = p.cumsum(-1)
        return torch.searchsorted(below, draw[:, None] * below[:, -1:], right=True).squeeze(-1)

    def seen(self, rows: int, vocabulary: int, device: torch.device) -> torch.Tensor | None:
        """Where the tokens so far are noted; None without a repetition penalty."""
        if self.settings.repetition_penalty == 1:
            return None
        return torch.zeros((rows, vocabulary), dtype=torch.bool, device=device)


def draws(prompt: Prompt) -> torch.Tensor:
    """float64 [limit]: the prompt's random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(prompt.seed)
    return torch.rand(prompt.limit, dtype=torch.float64, generator=generator)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The answer as a reader sees it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def answer(
    settings: Generate,
    prompts: Sequence[Prompt],
    *,
    teacher: Path,
    load_in_4bit: bool,
    journal: Journal,
    report: Reporter,
) -> dict[str, Any]:
    """Answer what the journal lacks. Raises ModelError, and HostError when not even one prompt fits in memory."""
    order = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.number))
    batches = [order[at : at + settings.batch_size] for at in range(0, len(order), settings.batch_size)]
    resumed = len(journal.answers)
    device = precision.pick_device()
    dtype = precision.decoding_type(device)
    size, seconds, tokens = settings.batch_size, 0.0, 0
    with bar(report, "teacher answers", total=len(prompts), unit="answer") as task:
        task.advance(resumed)
        model: Any = None
        tokenizer: Any = None
        stops: tuple[int, ...] = ()
        for batch in batches:
            missing = [prompt for prompt in batch if prompt.number not in journal.answers]
            while missing:
                if model is None:
                    model, tokenizer = load.load_model(teacher, dtype=dtype, device=device, load_in_4bit=load_in_4bit)
                    stops = load.stop_ids(teacher, tokenizer)
                started = time.perf_counter()
                part = missing[:size]
                decoded = _decode_if_it_fits(model, part, stops=stops, choose=Sampling(settings))
                seconds += time.perf_counter() - started
                if decoded is None:
                    size = _halve(part, report)
                    continue
                missing = missing[size:]
                tokens += sum(len(ids) for ids, _ in decoded)
                journal.add(
                    {
                        prompt.number: Candidate(text_of(tokenizer, ids), ids, finish)
                        for prompt, (ids, finish) in zip(part, decoded, strict=True)
                    }
                )
                task.advance(len(part))
    return {
        "engine": "transformers",
        "device": str(device),
        "precision": "nf4" if load_in_4bit else str(dtype).removeprefix("torch."),
        "decoding_batch_size": size,
        **speed(answers=len(prompts) - resumed, tokens=tokens, seconds=seconds),
        "answers_resumed": resumed,
    }


def _decode_if_it_fits(
    model: Any, batch: Sequence[Prompt], *, stops: Sequence[int], choose: Sampling
) -> list[Decoded] | None:
    """None when the GPU's memory is too small. The tensors are gone with the exception before the next try."""
    try:
        return decode(model, batch, stops=stops, choose=choose)
    except torch.OutOfMemoryError:
        return None


def _halve(batch: Sequence[Prompt], report: Reporter) -> int:
    torch.cuda.empty_cache()
    if len(batch) == 1:
        longest = f"{len(batch[0].ids)} + {batch[0].limit} tokens"
        raise HostError(
            f"GPU memory is too small for one answer ({batch[0].where}: {longest})",
            hint="lower generate.max_new_tokens, set teacher.load_in_4bit, or use a GPU with more memory; "
            "what was answered is kept",
        )
    half = len(batch) // 2
    report.line(f"GPU memory is too small for {len(batch)} answers at a time: going on with {half}")
    return half


@torch.inference_mode()
def decode(model: Any, batch: Sequence[Prompt], *, stops: Sequence[int], choose: Sampling) -> list[Decoded]:
    """Answers to left-padded prompts. Rows that have ended leave the batch when half of it has."""
    device = model.device
    head = load.head_of(model)
    width = max(len(prompt.ids) for prompt in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    seen = choose.seen(len(batch), head.vocabulary, device)
    chance = torch.zeros((len(batch), max(prompt.limit for prompt in batch)), dtype=torch.float64)
    for at, prompt in enumerate(batch):
        ids[at, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[at, width - len(prompt.ids) :] = 1
        chance[at, : prompt.limit] = draws(prompt)
        if seen is not None:
            seen[at, list(prompt.ids)] = True
    ids, mask, chance = ids.to(device), mask.to(device), chance.to(device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in batch]
    finishes: list[Finish] = ["length"] * len(batch)
    live = list(range(len(batch)))  # which prompt each row of the tensors belongs to
    ended = [False] * len(batch)
    cache = DynamicCache(config=model.config)
    for step in range(chance.shape[1]):
        hidden = load.backbone(model)(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        token = choose(head(hidden), seen, chance[:, step])
        for at, number in zip(live, token.tolist(), strict=True):
            if ended[at]:
                continue
            answers[at].append(number)
            if number in stops:
                finishes[at], ended[at] = "stop", True
            elif len(answers[at]) >= batch[at].limit:
                ended[at] = True
        going = [row for row, at in enumerate(live) if not ended[at]]
        if not going:
            break
        if seen is not None:
            seen[torch.arange(len(live), device=device), token] = True
        if len(going) <= len(live) // 2:
            rows = torch.tensor(going, device=device)
            cache.batch_select_indices(rows)
            mask, token, position, chance = mask[rows], token[rows], position[rows], chance[rows]
            seen = None if seen is None else seen[rows]
            live = [live[row] for row in going]
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=-1)
        position = position[:, -1:] + 1
    return [(tuple(found), finish) for found, finish in zip(answers, finishes, strict=True)]
