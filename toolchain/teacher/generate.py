"""Questions → rows with answers: the teacher's own, or those of the data set. Writes train.jsonl and held_out.jsonl.

Batches are formed once, by prompt length, and each is decoded from its own seed: a resumed run asks the same batches
and gets the same answers. `resume/answers.jsonl` has one line per batch that is done.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import DynamicCache

from toolchain.data.formats import Example, check_disjoint, read_examples
from toolchain.data.rows import Finish, Message, Row, write_rows
from toolchain.errors import DataError, ModelError
from toolchain.recipe import Data, Generate
from toolchain.reporter import Reporter, bar
from toolchain.student import load, precision

SETS = ("train", "held_out")


@dataclass(frozen=True)
class _Prompt:
    example: Example
    set: str
    ids: tuple[int, ...]
    limit: int
    """Most answer tokens."""


@dataclass(frozen=True)
class _Answer:
    ids: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True)
class _Sampling:
    """How the next token is chosen from logits [rows, vocabulary]."""

    settings: Generate
    generator: torch.Generator

    def __call__(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Token ids [rows]. `seen`, bool like `logits`: tokens of prompt and answer so far."""
        if bool(logits.isnan().any()):
            raise ModelError("the teacher's logits are not finite", hint="its weights are damaged or overflow 16 bits")
        penalty = self.settings.repetition_penalty
        if penalty != 1.0:
            # Keskar et al. 2019 (CTRL), in the form that keeps the sign: positive logits shrink, negative ones grow.
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.settings.sampling_temperature == 0:
            return logits.argmax(-1)
        p, ids = torch.sort((logits / self.settings.sampling_temperature).softmax(-1), descending=True)
        if self.settings.sampling_top_p < 1:
            # A token stays while those before it hold less than top_p, so that the first always does.
            p = p.masked_fill(p.cumsum(-1) - p >= self.settings.sampling_top_p, 0.0)
        choice = torch.multinomial(p, 1, generator=self.generator)
        return ids.gather(-1, choice).squeeze(-1)


def run(
    settings: Generate,
    data: Data,
    *,
    seed: int,
    teacher: Path,
    train: Path,
    held_out: Path,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Answer every question. `teacher` is a checkpoint folder; rows keep the order of their files.

    Raises DataError (a row that does not fit, no rows left), ModelError.
    """
    need_answer = settings.answers == "dataset"
    examples = {
        name: read_examples(path, format=data.format, need_answer=need_answer, system=data.system)
        for name, path in zip(SETS, (train, held_out), strict=True)
    }
    check_disjoint(examples["train"], examples["held_out"])
    tokenizer = load.load_tokenizer(teacher)
    stops = load.stop_ids(teacher, tokenizer)
    counts = {f"{name}_too_long": 0 for name in SETS}
    prompts: list[_Prompt] = []
    for name in SETS:
        for example in examples[name]:
            ids = render(tokenizer, example.messages, where=example.where)
            room = data.max_length - len(ids)
            if room < 1:
                _too_long(example, f"the question alone has {len(ids)} tokens", data)
                counts[f"{name}_too_long"] += 1
            else:
                prompts.append(_Prompt(example, name, ids, min(settings.max_new_tokens, room)))
    started = time.perf_counter()
    if need_answer:
        answers = [_from_dataset(tokenizer, prompt, stops) for prompt in prompts]
        asked: dict[str, Any] = {}
    else:
        answers, asked = _ask(settings, prompts, seed=seed, teacher=teacher, stops=stops, out=out, report=report)
    kept, dropped = _filter(settings, data, prompts, answers, tokenizer)
    for key, value in dropped.items():
        counts[key] = counts.get(key, 0) + value
    for name in SETS:
        if not kept[name]:
            left = {key: value for key, value in counts.items() if key.startswith(name) and value}
            raise DataError(
                f"{name}: none of {len(examples[name])} rows is left: {json.dumps(left)}",
                hint="raise data.max_length or generate.max_new_tokens, or look at the questions",
            )
        write_rows(out / f"{name}.jsonl", kept[name])
    sizes = {name: len(kept[name]) for name in SETS}
    summary = f"{sizes['train']} rows to train on, {sizes['held_out']} held out, {sum(counts.values())} dropped"
    return {
        "summary": summary,
        "answers": settings.answers,
        "rows": sizes,
        "dropped": counts,
        "prompt_tokens": sum(len(row.prompt_ids) for name in SETS for row in kept[name]),
        "answer_tokens": sum(len(row.answer_ids) for name in SETS for row in kept[name]),
        "seconds": time.perf_counter() - started,
        **asked,
    }


def render(tokenizer: Any, messages: Sequence[Message], *, where: str, answer: str | None = None) -> tuple[int, ...]:
    """Token ids of a conversation as the chat template writes it: up to the answer, or with it. Raises ModelError."""
    if not tokenizer.chat_template:
        raise ModelError(f"{tokenizer.name_or_path}: no chat template", hint="put its chat_template.jinja there")
    turns = [message.as_dict() for message in messages]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    import jinja2  # what templates raise; loaded by transformers anyway

    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
    except jinja2.TemplateError as error:
        raise ModelError(f"{where}: the chat template refuses it: {error}") from error
    # The template writes bos itself where the model has one.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _from_dataset(tokenizer: Any, prompt: _Prompt, stops: Sequence[int]) -> _Answer:
    example = prompt.example
    assert example.answer is not None
    whole = render(tokenizer, example.messages, where=example.where, answer=example.answer)
    if whole[: len(prompt.ids)] != prompt.ids:
        raise ModelError(
            f"{example.where}: with its answer the conversation no longer starts with the prompt's tokens",
            hint="this chat template cannot be used with generate.answers = 'dataset'; use 'teacher'",
        )
    tail = whole[len(prompt.ids) :]
    ends = [at for at, token in enumerate(tail) if token in stops]
    if not ends:
        raise ModelError(
            f"{example.where}: the chat template ends the answer without an eos token (ids {list(stops)})",
            hint="set eos_token to what ends a turn in the template, else the student never learns to stop",
        )
    if len(ends) > 1:
        raise DataError(f"{example.where}: the answer holds an eos token in its text", hint="remove it from the answer")
    return _Answer(tail[: ends[0] + 1], "stop")


def _too_long(example: Example, what: str, data: Data) -> None:
    if data.too_long == "error":
        raise DataError(
            f"{example.where}: {what}; data.max_length is {data.max_length}",
            hint="raise data.max_length, shorten the row, or set data.too_long = 'drop'",
        )


def _filter(
    settings: Generate, data: Data, prompts: Sequence[_Prompt], answers: Sequence[_Answer], tokenizer: Any
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """Rows that are fit to learn from, per set, and how many were not, per set and reason."""
    kept: dict[str, list[Row]] = {name: [] for name in SETS}
    dropped = {f"{name}_{reason}": 0 for name in SETS for reason in ("too_long", "truncated", "empty")}
    for prompt, answer in zip(prompts, answers, strict=True):
        example = prompt.example
        size = len(prompt.ids) + len(answer.ids)
        cut_short = answer.finish == "length" and len(answer.ids) < settings.max_new_tokens
        if size > data.max_length or cut_short:
            more = "or more " if cut_short else ""
            _too_long(example, f"question and answer have {size} {more}tokens", data)
            dropped[f"{prompt.set}_too_long"] += 1
            continue
        if answer.finish == "length" and settings.truncated == "drop":
            dropped[f"{prompt.set}_truncated"] += 1
            continue
        text = tokenizer.decode(list(answer.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        if not text:
            dropped[f"{prompt.set}_empty"] += 1
            continue
        kept[prompt.set].append(Row(example.id, example.messages, text, prompt.ids, answer.ids, answer.finish))
    return kept, dropped


# --- The teacher's answers.


def _ask(
    settings: Generate,
    prompts: Sequence[_Prompt],
    *,
    seed: int,
    teacher: Path,
    stops: Sequence[int],
    out: Path,
    report: Reporter,
) -> tuple[list[_Answer], dict[str, Any]]:
    order = sorted(range(len(prompts)), key=lambda at: (len(prompts[at].ids), at))
    size = settings.batch_size
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    journal = out / "resume" / "answers.jsonl"
    journal.parent.mkdir(exist_ok=True)
    answers = _read_journal(journal)
    resumed = len(answers)
    todo = [at for at, batch in enumerate(batches) if not all(row in answers for row in batch)]
    device = precision.pick_device()
    dtype = precision.decoding_type(device)
    seconds = 0.0
    tokens = rows = 0
    with bar(report, "teacher answers", total=len(prompts), unit="row") as task, journal.open("a") as file:
        task.advance(resumed)
        model = load.load_model(teacher, dtype=dtype, device=device)[0] if todo else None
        for number in todo:
            batch = [prompts[at] for at in batches[number]]
            started = time.perf_counter()
            # A seed per batch, not one stream: a resumed run samples as an uninterrupted one.
            digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
            found = _decode(model, batch, stops=stops, choose=_Sampling(settings, generator))
            seconds += time.perf_counter() - started
            for at, answer in zip(batches[number], found, strict=True):
                answers[at] = answer
                tokens += len(answer.ids)
            rows += len(batch)
            entries = [[at, answers[at].finish, *answers[at].ids] for at in batches[number]]
            file.write(json.dumps(entries) + "\n")
            file.flush()
            os.fsync(file.fileno())
            task.advance(len(batch))
    return [answers[at] for at in range(len(prompts))], {
        "engine": "transformers",
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "decoding_seconds": seconds,
        "rows_per_second": rows / seconds if seconds else None,
        "answer_tokens_per_second": tokens / seconds if seconds else None,
        "rows_resumed": resumed,
    }


def _read_journal(path: Path) -> dict[int, _Answer]:
    """Answers by index of their prompt. A last line that a kill cut short is taken off the file."""
    if not path.exists():
        return {}
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    with path.open("r+b") as file:
        file.truncate(len(whole) + len(end))
    answers: dict[int, _Answer] = {}
    for line in whole.splitlines():
        for at, finish, *ids in json.loads(line):
            answers[at] = _Answer(tuple(ids), cast(Finish, finish))
    return answers


@torch.inference_mode()
def _decode(model: Any, batch: Sequence[_Prompt], *, stops: Sequence[int], choose: _Sampling) -> list[_Answer]:
    """Answers to left-padded prompts. Rows that have ended leave the batch when half of it has."""
    device = model.device
    head = load.head_of(model)
    width = max(len(prompt.ids) for prompt in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    seen = torch.zeros((len(batch), head.vocabulary), dtype=torch.bool)
    for at, prompt in enumerate(batch):
        ids[at, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[at, width - len(prompt.ids) :] = 1
        seen[at, list(prompt.ids)] = True
    ids, mask, seen = ids.to(device), mask.to(device), seen.to(device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in batch]
    finishes: list[Finish] = ["length"] * len(batch)
    live = list(range(len(batch)))  # which prompt each row of the tensors belongs to
    ended = [False] * len(batch)
    cache = DynamicCache(config=model.config)
    while True:
        hidden = load.backbone(model)(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        token = choose(head(hidden), seen)
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
        seen[torch.arange(len(live), device=device), token] = True
        if len(going) <= len(live) // 2:
            rows = torch.tensor(going, device=device)
            cache.batch_select_indices(rows)
            mask, seen, token, position = mask[rows], seen[rows], token[rows], position[rows]
            live = [live[row] for row in going]
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=-1)
        position = position[:, -1:] + 1
    return [_Answer(tuple(found), finish) for found, finish in zip(answers, finishes, strict=True)]
