"""Distillation loss on answer tokens: ce_weight · CE + kl_weight · T² · KL(teacher ‖ student). Tensors in, tensors out.

The teacher is known by its top-k log-probabilities; what they leave is the (k+1)-th bucket, with its exact mass
(docs/logit-cache.md). The head is applied to a chunk of positions at a time and again in the backward pass, so that
logits of [batch, length, vocabulary] never exist.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Stands for −inf among logits: the gradient of logsumexp over nothing but −inf is NaN.
_NOWHERE = -1e30


@dataclass(frozen=True)
class Teacher:
    """What the teacher says at N positions, at the loss's temperature T."""

    ids: torch.Tensor
    """int64 [N, K]; ids of a position differ from each other where `logprobs` is finite"""
    logprobs: torch.Tensor
    """[N, K]: log p_T of these ids; −inf marks an empty slot. Each position has at least one that is not."""


@dataclass(frozen=True)
class Loss:
    """`total` has the gradient; the parts are weighted as they stand in it only by their divisor."""

    total: torch.Tensor
    ce: torch.Tensor
    """Σ cross-entropy / tokens, nats; 0 where ce_weight is 0"""
    kl: torch.Tensor
    """Σ KL(teacher ‖ student) at T / tokens, nats, without T²; 0 without a teacher"""


def distillation_loss(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    teacher: Teacher | None,
    *,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    tokens: float,
    chunk: int = 512,
) -> Loss:
    """Loss of N answer positions: `hidden` [N, H] → `head` → logits [n, V]; `labels` int64 [N].

    `tokens` divides the sums: the answer tokens of the whole accumulated batch. N = 0 gives 0 and zero gradients.
    """
    zero = hidden.sum() * 0.0
    ce, kl = zero.float(), zero.float()
    use_kl = kl_weight > 0 and teacher is not None
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        ids = teacher.ids[part] if use_kl and teacher is not None else None
        logprobs = teacher.logprobs[part] if use_kl and teacher is not None else None
        ce_sum, kl_sum = checkpoint(
            _chunk, hidden[part], head, labels[part], ids, logprobs, temperature, ce_weight > 0, use_reentrant=False
        )
        ce, kl = ce + ce_sum, kl + kl_sum
    # Soft targets shrink gradients by 1/T² (Hinton et al. 2015); T² keeps kl_weight comparable across temperatures.
    total = (ce_weight * ce + kl_weight * temperature**2 * kl) / tokens
    return Loss(total, (ce / tokens).detach(), (kl / tokens).detach())


def _chunk(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    ids: torch.Tensor | None,
    logprobs: torch.Tensor | None,
    temperature: float,
    with_ce: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of cross-entropy and KL over the positions of a chunk."""
    logits = head(hidden)
    none = logits.new_zeros(())
    ce = functional.cross_entropy(logits, labels, reduction="sum") if with_ce else none
    kl = top_k_kl(logits / temperature, ids, logprobs).sum() if ids is not None and logprobs is not None else none
    return ce, kl


def top_k_kl(scaled: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) over the kept ids and one bucket for all others. Returns [N], in nats.

    `scaled` [N, V] are the student's logits over T; `ids`, `logprobs` [N, K] as in Teacher. The bucket's student mass
    is the logsumexp over the other logits, not 1 − kept mass, which would cancel where the tail is small.
    """
    filled = logprobs.isfinite()
    # An empty slot must not hide the logit of a token that is in the tail: it repeats the first id.
    ids = torch.where(filled, ids, ids[:, :1])
    kept = torch.where(filled, scaled.gather(-1, ids), _NOWHERE)
    rest = torch.logsumexp(scaled.scatter(-1, ids, _NOWHERE), dim=-1)
    log_kept = torch.logsumexp(kept, dim=-1)
    log_total = torch.logaddexp(log_kept, rest)

    teacher = torch.where(filled, logprobs, 0.0).double()
    p = torch.where(filled, teacher.exp(), 0.0)
    has_tail = filled.sum(-1) < scaled.shape[-1]
    tail = torch.where(has_tail, (1.0 - p.sum(-1)).clamp(min=0.0), 0.0)
    entropy_part = (p * teacher).sum(-1) + torch.xlogy(tail, tail)
    kept_part = (p.to(scaled.dtype) * torch.where(filled, kept - log_total[:, None], 0.0)).sum(-1)
    tail_part = tail.to(scaled.dtype) * torch.where(has_tail, rest - log_total, 0.0)
    return entropy_part.to(scaled.dtype) - kept_part - tail_part
