"""Distillation loss on answer tokens: ce_weight · CE + kl_weight · T² · KL(teacher ‖ student). Tensors in, tensors out.

The teacher is known by its top-k log-probabilities; what they leave is the (k+1)-th bucket, with its exact mass
(docs/logit-cache.md). The head is applied to a chunk of positions at a time, so that logits of [batch, length,
vocabulary] never exist: a plain frozen head in one pass that forms the gradient by hand, any other head again in the
backward pass. Both are tested against the same dense float64 reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    weight: torch.Tensor | None = None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    tokens: float,
    chunk: int = 512,
) -> Loss:
    """Loss of N answer positions: `hidden` [N, H] → `head` → logits [n, V]; `labels` int64 [N].

    `tokens` divides the sums: the answer tokens of the whole accumulated batch. N = 0 gives 0 and zero gradients.
    `weight` [V, H] says that `head` is that matrix and nothing more, and frozen: then the one-pass way is taken.
    """
    zero = hidden.sum() * 0.0
    ce, kl = zero.float(), zero.float()
    use_kl = kl_weight > 0 and teacher is not None
    if weight is not None and not weight.requires_grad and hidden.shape[0] > 0:
        known = teacher if use_kl else None
        apply: Any = _OnePass.apply
        total, ce, kl = apply(hidden, weight, labels, known, temperature, ce_weight, kl_weight, chunk)
        return Loss(total / tokens, ce / tokens, kl / tokens)
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


@dataclass(frozen=True)
class _Buckets:
    """Teacher and student at N positions over the kept ids and one bucket for all others."""

    ids: torch.Tensor
    """int64 [N, K]; an empty slot repeats the first id"""
    filled: torch.Tensor
    """bool [N, K]"""
    p: torch.Tensor
    """float64 [N, K]: the teacher's probabilities, 0 in empty slots"""
    has_tail: torch.Tensor
    """bool [N]"""
    tail: torch.Tensor
    """float64 [N]: the teacher's mass outside the kept ids"""
    kept: torch.Tensor
    """[N, K]: the student's logits over T on the kept ids"""
    others: torch.Tensor
    """[N, V]: the student's logits over T, with the kept ids put out of sight"""
    rest: torch.Tensor
    """[N]: logsumexp of `others`"""
    log_total: torch.Tensor
    """[N]: logsumexp of all logits over T"""
    kl: torch.Tensor
    """[N], nats"""


def _buckets(scaled: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> _Buckets:
    """The student's mass in the bucket is the logsumexp over the other logits: 1 − kept mass would cancel where the
    tail is small."""
    filled = logprobs.isfinite()
    # An empty slot must not hide the logit of a token that is in the tail.
    ids = torch.where(filled, ids, ids[:, :1])
    kept = torch.where(filled, scaled.gather(-1, ids), _NOWHERE)
    others = scaled.scatter(-1, ids, _NOWHERE)
    rest = torch.logsumexp(others, dim=-1)
    log_total = torch.logaddexp(torch.logsumexp(kept, dim=-1), rest)

    teacher = torch.where(filled, logprobs, 0.0).double()
    p = torch.where(filled, teacher.exp(), 0.0)
    has_tail = filled.sum(-1) < scaled.shape[-1]
    tail = torch.where(has_tail, (1.0 - p.sum(-1)).clamp(min=0.0), 0.0)
    entropy_part = (p * teacher).sum(-1) + torch.xlogy(tail, tail)
    kept_part = (p.to(scaled.dtype) * torch.where(filled, kept - log_total[:, None], 0.0)).sum(-1)
    tail_part = tail.to(scaled.dtype) * torch.where(has_tail, rest - log_total, 0.0)
    kl = entropy_part.to(scaled.dtype) - kept_part - tail_part
    return _Buckets(ids, filled, p, has_tail, tail, kept, others, rest, log_total, kl)


def top_k_kl(scaled: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) over the kept ids and one bucket for all others. Returns [N], in nats.

    `scaled` [N, V] are the student's logits over T; `ids`, `logprobs` [N, K] as in Teacher.
    """
    return _buckets(scaled, ids, logprobs).kl


class _OnePass(torch.autograd.Function):
    """Loss and its gradient with respect to `hidden` in one pass over the head, as Liger's fused losses do.

    With q = softmax(z/T), p the teacher's kept probabilities and t its tail: ∂KL/∂(z/T) is q − p on kept ids and
    q · (1 − t/Σ_rest q) on the others; ∂CE/∂z is softmax(z) − onehot. The sums have no gradient of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        teacher: Teacher | None,
        temperature: float,
        ce_weight: float,
        kl_weight: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Under autocast a frozen matrix would be cast anew at every use.
        if torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(torch.get_autocast_dtype(hidden.device.type))
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        gradient = torch.empty_like(hidden, dtype=exact)
        ce = hidden.new_zeros((), dtype=exact)
        kl = hidden.new_zeros((), dtype=exact)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part].to(weight.dtype) @ weight.T).to(exact)
            by_logit = torch.zeros_like(logits)
            if ce_weight > 0:
                logprobs = logits.log_softmax(-1)
                ce -= logprobs.gather(-1, labels[part, None]).sum()
                by_logit = logprobs.exp_().mul_(ce_weight)
                by_logit.scatter_add_(-1, labels[part, None], by_logit.new_full((len(by_logit), 1), -ce_weight))
            if teacher is not None:
                slope, value = _kl_slope(logits / temperature, teacher.ids[part], teacher.logprobs[part])
                kl += value
                by_logit.add_(slope, alpha=kl_weight * temperature)  # T² · ∂(z/T)/∂z
            gradient[part] = (by_logit.to(weight.dtype) @ weight).to(exact)
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        total = ce_weight * ce + kl_weight * temperature**2 * kl
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(ctx.dtype), None, None, None, None, None, None, None


def _kl_slope(scaled: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """∂ΣKL/∂scaled [N, V] and ΣKL over the positions, of `top_k_kl` with the same arguments."""
    found = _buckets(scaled, ids, logprobs)
    p, tail = found.p.to(scaled.dtype), found.tail.to(scaled.dtype)
    mass = (found.p.sum(-1) + found.tail).to(scaled.dtype)
    # Off the kept ids: mass·q − t·q/Σ_rest q, formed from logs so that a small rest does not divide by zero.
    slope = found.others.sub_(found.rest[:, None]).exp_()  # q / Σ_rest q; 0 on kept ids
    slope.mul_((mass * (found.rest - found.log_total).exp() - tail)[:, None])
    q_kept = (found.kept - found.log_total[:, None]).exp()
    on_kept = torch.where(found.filled, mass[:, None] * q_kept - p, 0.0)
    # An empty slot repeats the first id and adds nothing to it.
    return slope.scatter_add_(-1, found.ids, on_kept), found.kl.sum()
