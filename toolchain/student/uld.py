"""Student + rows + a teacher with another tokenizer, in memory → LoRA adapter. Writes adapter/ and log.jsonl.

Loss per answer token: ce_weight · CE + kl_weight · ULD. The universal logit distillation loss (Boizard et al. 2024,
arXiv 2402.12030) is Σ |sorted p − sorted q| between the two distributions of the next token, padded to one width; both
at `distill.temperature`. It is TRL's ULDLoss in the form of GOLD: where the tokenizers cut the answer differently,
tokens up to the next common cut count as one, and the probability of those before the last is multiplied in.
Checkpoints go to resume/, as in `distill`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import set_seed
from trl.experimental.gold.gold_trainer import ULDLoss

from toolchain.data.rows import Row, read_rows
from toolchain.errors import DataError, ModelError
from toolchain.recipe import Distill
from toolchain.reporter import Reporter, bar
from toolchain.student import distill, load, parallel, precision
from toolchain.student.engine import load_for_training
from toolchain.student.losses import Loss
from toolchain.teacher.generate import render

IGNORE = -100


@dataclass(frozen=True)
class Pair:
    """A row in the student's tokens, the same in the teacher's, and where each answer token ends in the text."""

    student: Row
    teacher: Row
    student_ends: tuple[int, ...]
    teacher_ends: tuple[int, ...]


def run(
    settings: Distill,
    *,
    max_length: int,
    seed: int,
    teacher: Path,
    base: Path,
    rows: Path,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Train. `teacher` and `base` are checkpoint folders; `rows` are in the student's tokens.

    Raises DataError, ModelError (a loss that is not finite: the step is named), RecipeError, HostError (GPU memory).
    """
    examples = read_rows(rows)
    _check(examples, rows, max_length=max_length)
    device = precision.pick_device()
    autocast = precision.autocast_type(settings.precision, device)
    teacher_model, teacher_tokenizer = load.load_model(teacher, dtype=precision.weights_type(device), device=device)
    pairs = _pairs(
        examples, load.load_tokenizer(base), teacher_tokenizer, load.stop_ids(teacher, teacher_tokenizer), report
    )
    _check_context(pairs.values(), teacher_model)
    batches = distill.plan(examples, settings, seed=seed)
    set_seed(seed)
    model = load_for_training(settings, "transformers", base, max_length=max_length, seed=seed, device=device)
    step = _Step(model, teacher_model, settings, autocast)
    collate = _Collator(pairs)
    if device.type == "cuda":
        distill._check_memory(step, collate, batches, settings)
        set_seed(seed)
    return {
        **distill.train(step, collate, batches, seed=seed, device=device, out=out, report=report),
        "rows": len(examples),
        "engine": "transformers",
        "trl": trl.__version__,
    }


def _check(rows: Sequence[Row], path: Path, *, max_length: int) -> None:
    if not rows:
        raise DataError(f"{path}: no rows")
    for row in rows:
        if not row.answer_ids or not row.prompt_ids:
            raise DataError(f"{path}: row {row.id} has no answer token to learn from", hint="run `select` again")
        if len(row.token_ids) > max_length:
            raise DataError(f"{path}: row {row.id} has {len(row.token_ids)} tokens; data.max_length is {max_length}")


def _check_context(pairs: Iterable[Pair], teacher: Any) -> None:
    limit = getattr(teacher.config, "max_position_embeddings", None)
    for found in pairs:
        if limit is not None and len(found.teacher.token_ids) > limit:
            raise DataError(
                f"row {found.student.id}: {len(found.teacher.token_ids)} tokens for the teacher, "
                f"which was made for {limit}",
                hint="lower data.max_length",
            )


# --- The same answer in both tokenizers.


def pair(row: Row, student: Any, teacher: Any, stops: Sequence[int]) -> Pair:
    """The row as the teacher's template and tokenizer write it. `stops` end the teacher's turn. Raises ModelError."""
    prompt = render(teacher, row.messages, where=row.id)
    whole = render(teacher, row.messages, where=row.id, answer=row.answer)
    if whole[: len(prompt)] != prompt:
        raise ModelError(
            f"{row.id}: with its answer the conversation no longer starts with the prompt's tokens for the teacher",
            hint="this chat template cannot be used with distill.method = 'uld'; use 'answers'",
        )
    answer = whole[len(prompt) :]
    end = next((at for at, token in enumerate(answer) if token in stops), None)
    if end is None:
        raise ModelError(
            f"{row.id}: the teacher's chat template ends the answer without an eos token (ids {list(stops)})",
            hint="set eos_token to what ends a turn in the template",
        )
    # An answer that was cut short has no end to learn, on either side.
    answer = answer[: end + 1] if row.finish == "stop" else answer[:end]
    if not answer:
        raise ModelError(f"{row.id}: the teacher's chat template leaves nothing of the answer")
    translated = Row(row.id, row.messages, row.answer, prompt, answer, row.finish)
    return Pair(row, translated, text_ends(student, row.answer_ids), text_ends(teacher, answer))


def _pairs(rows: Sequence[Row], student: Any, teacher: Any, stops: Sequence[int], report: Reporter) -> dict[str, Pair]:
    """By the key of the student's row."""
    pairs = {}
    with bar(report, "align tokens", total=len(rows), unit="row") as task:
        for row in rows:
            pairs[row.key] = pair(row, student, teacher, stops)
            task.advance()
    return pairs


def text_ends(tokenizer: Any, ids: Sequence[int]) -> tuple[int, ...]:
    """For each token, how many bytes of text there are up to its end, special tokens and leading space aside.

    A token that ends within a character ends where that character began.
    """

    def decode(part: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(part), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    ends = []
    size = start = whole = 0
    # Decoded piece by piece behind the last whole piece: what a token means may depend on the one before it.
    for at in range(1, len(ids) + 1):
        before, now = decode(ids[start:whole]), decode(ids[start:at])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            piece = now[len(before) :]
            size += len((piece if size else piece.lstrip()).encode())
            start, whole = whole, at
        ends.append(size)
    return tuple(ends)


# --- The loss.


class AlignedULD(ULDLoss):  # type: ignore[misc]
    """TRL's ULDLoss without its cross-entropy, for one answer at a time."""

    def __init__(self, temperature: float) -> None:
        # What ULDLoss reads of a GOLDConfig: that is a TrainingArguments too, and making one resets accelerate.
        config = SimpleNamespace(
            use_extended_uld=True,
            # "observed", the default, compares the distributions behind each token, not those that predict it.
            uld_token_merge_strategy="bayesian",  # noqa: S106 - a name
            uld_use_hybrid_loss=False,
            uld_crossentropy_weight=0.0,
            uld_distillation_weight=1.0,
            uld_student_temperature=temperature,
            uld_teacher_temperature=temperature,
            # Both answers end with an eos, or neither: it is a pair like any other.
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
        )
        super().__init__(config)

    def of(self, student: torch.Tensor, teacher: torch.Tensor, found: Pair) -> torch.Tensor:
        """Mean over the aligned groups of one row; logits are [answer tokens, width] each."""
        sides = ((found.student, found.student_ends), (found.teacher, found.teacher_ends))
        # TRL looks for the answer behind a prompt, and for what predicts it one position earlier: hence a first token.
        ids = [torch.tensor([[0, *row.answer_ids]]) for row, _ in sides]
        labels = [torch.tensor([[IGNORE, *row.answer_ids]]) for row, _ in sides]
        offsets = [torch.tensor([[(0, 0), *((0, end) for end in ends)]]) for _, ends in sides]
        loss: torch.Tensor = self(student[None], teacher[None], *labels, *ids, *offsets)
        return loss

    def _merge_probabilities_with_alignment_groups(
        self, probs: torch.Tensor, alignment_groups: list[list[int]], token_ids: list[int] | None = None
    ) -> torch.Tensor:
        """As in TRL, in one product: TRL fills a tensor group by group, and the backward pass of that copies the whole
        of it for each group (200 tokens × 49k ids: 8.4 s, against 0.1 s)."""
        assert token_ids is not None
        first = torch.tensor([group[0] for group in alignment_groups], device=probs.device)
        last = torch.tensor([group[-1] for group in alignment_groups], device=probs.device)
        taken = probs.gather(-1, torch.tensor(token_ids, device=probs.device)[:, None]).squeeze(-1)
        logs = taken.clamp_min(1e-8).log()
        before = logs.cumsum(0) - logs
        return probs[last] * (before[last] - before[first]).exp()[:, None]


class _Collator(distill._Collator):
    """One planned batch → this process's share of it: the student's tensors, and the same answers for the teacher."""

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        super().__init__(None, temperature=1.0, vocabulary=0)  # of a cache, and there is none
        self.pairs = pairs

    def __call__(self, batches: Sequence[Sequence[Row]]) -> dict[str, Any]:
        """As in distill; `teacher_ids` [rows, length], `teacher_at` [M] say the same of the teacher's tokens."""
        tensors = super().__call__(batches)
        pairs = [self.pairs[row.key] for row in batches[0][parallel.rank() :: parallel.world()]]
        if pairs:
            batch = load.pad_rows([found.teacher for found in pairs], pad_id=0)
            tensors["teacher_ids"] = batch.input_ids
            tensors["teacher_at"] = batch.answers.flatten().nonzero().squeeze(-1)
        return {**tensors, "pairs": pairs}


class _Step(distill._Step):
    """Forward passes of student and teacher, and the loss of one batch."""

    def __init__(self, model: Any, teacher: Any, settings: Distill, autocast: torch.dtype | None) -> None:
        super().__init__(model, settings, autocast, None)
        self.teacher, self.teacher_head = teacher, load.head_of(teacher)
        self.divergence = "uld"
        self.uld = AlignedULD(settings.temperature)

    def __call__(self, model: Any, inputs: Mapping[str, Any], answer_tokens: int) -> Loss:
        """The loss of this process's share; `divergence` of it is the mean ULD per answer token."""
        kind = inputs["input_ids"].device.type
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            hidden = model(inputs["input_ids"])
            ce = uld = hidden.sum().float() * 0.0
            if inputs["pairs"]:
                with torch.no_grad():
                    known = load.backbone(self.teacher)(input_ids=inputs["teacher_ids"], use_cache=False)
                sizes = [len(found.student.answer_ids) for found in inputs["pairs"]]
                teacher_sizes = [len(found.teacher.answer_ids) for found in inputs["pairs"]]
                states = _split(hidden, inputs["at"], sizes)
                known_states = _split(known.last_hidden_state, inputs["teacher_at"], teacher_sizes)
                labels = torch.split(inputs["labels"], sizes)
                for parts in zip(states, known_states, labels, inputs["pairs"], strict=True):
                    # Logits of one row at a time, and again in the backward pass.
                    row_ce, row_uld = checkpoint(self._row, *parts, use_reentrant=False)
                    ce, uld = ce + row_ce, uld + row_uld
        ce, uld = ce / answer_tokens, uld / answer_tokens
        total = self.settings.ce_weight * ce + self.settings.kl_weight * uld
        return Loss(total, ce.detach(), uld.detach())

    def _row(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, found: Pair
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CE and ULD of one row, both as sums over its answer tokens."""
        logits = self.head(student)
        with torch.no_grad():
            known = self.teacher_head(teacher)
        ce = functional.cross_entropy(logits, labels, reduction="sum")
        return ce, self.uld.of(logits, known, found) * len(labels)


def _split(hidden: torch.Tensor, at: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """Hidden states [batch, length, H] → for each row those that predict its answer, [answer tokens, H]."""
    return torch.split(hidden.flatten(0, 1).index_select(0, at), sizes)
