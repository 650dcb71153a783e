"""Distillation loss on answer tokens: ce_weight · CE + kl_weight · T² · D(teacher, student). Tensors in, tensors out.

The teacher is known by its top-k log-probabilities; what they leave is the (k+1)-th bucket, with its exact mass
(docs/logit-cache.md). D is taken over these k + 1 buckets, so it depends on the student's V logits only through the
log-probabilities of the buckets: each D below gives its value and its slope there, and one piece of code carries the
slope on to the logits. The head is applied to a chunk of positions at a time, so that logits of [batch, length,
vocabulary] never exist: a plain frozen head in one pass that forms the gradient by hand, any other head again in the
backward pass.

With p the teacher's and q the student's probabilities of the buckets at T, and m a mixture of both:

    forward_kl       KL(p ‖ q)
    reverse_kl       KL(q ‖ p)
    jsd              β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = βp + (1 − β)q    Agarwal et al. 2024 (GKD), arXiv 2306.13649
    skew_kl          KL(p ‖ m), m = αp + (1 − α)q                         Ko et al. 2024 (DistiLLM), arXiv 2402.03898
    skew_reverse_kl  KL(q ‖ m), m = αq + (1 − α)p                         likewise
    tvd              ½ Σ |p − q|

jsd / β tends to forward_kl for β → 0, and jsd / (1 − β) to reverse_kl for β → 1; jsd itself tends to 0 at both ends, so
a β near an end needs a larger kl_weight. The skewed ones tend to the plain ones for α → 0.

T²: where T is large, the gradient of each D but tvd shrinks by 1/T² (Hinton et al. 2015), and T² makes up for it. That
of tvd shrinks by 1/T only, for it follows the sign of q − p, not its size: with T² its weight grows in proportion to T.

Reverse KL is infinite where the teacher has no mass and the student has some. Kept ids have a finite log p each. The
tail is 1 − Σ of float32 numbers, so that below 2⁻²³ it is not known: log p of the tail is taken as no less than
log 2⁻²³, and student mass in a tail that the teacher calls empty costs 15.9 nats. The other D need no floor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from toolchain.errors import ArtifactError

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]

TAIL_FLOOR = 2.0**-23
_CHUNK_CPU = 128
_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Objective:
    """What is minimised; the fields are those of recipe.Distill."""

    temperature: float
    ce_weight: float
    kl_weight: float
    divergence: Divergence
    jsd_beta: float
    """β, the teacher's share in the mixture of jsd"""
    skew: float
    """α of skew_kl and skew_reverse_kl"""


@dataclass(frozen=True)
class Teacher:
    """What the teacher says at N positions, at the loss's temperature T."""

    ids: torch.Tensor
    """int64 [N, K]; ids of a position differ from each other where `logprobs` is finite"""
    logprobs: torch.Tensor
    """[N, K]: log p_T of these ids; −inf marks an empty slot. Each position has at least one that is not."""

    def check(self, vocabulary: int) -> None:
        """Raises ArtifactError for an id that the student does not have, and for NaN.

        On a GPU the loss leaves this out, since it would wait for the device: call it before tensors are moved there.
        """
        hint = "run the `capture` stage again, with this student"
        wrong = (self.ids < 0) | (self.ids >= vocabulary)
        if wrong.any():
            raise ArtifactError(
                f"captured logits name the token id {int(self.ids[wrong][0])}; the student's head has ids from 0 to "
                f"{vocabulary - 1}",
                hint=hint,
            )
        if self.logprobs.isnan().any():
            raise ArtifactError("captured logits hold a log-probability that is not a number", hint=hint)


@dataclass(frozen=True)
class Loss:
    """`total` has the gradient; the parts are weighted as they stand in it only by their divisor."""

    total: torch.Tensor
    ce: torch.Tensor
    """Σ cross-entropy / tokens, nats; 0 where ce_weight is 0"""
    divergence: torch.Tensor
    """Σ D at T / tokens, without T²: nats, or a share for tvd; 0 without a teacher"""


def pick_chunk(vocabulary: int, device: torch.device) -> int:
    """Positions per use of the head.

    On a GPU: as many as 256 MiB of 16-bit logits hold, in steps of 64 and from 128 to 1024; the one-pass way holds
    nothing else of that size. Fewer and larger products take less of the processor's time, which launches them one by
    one. On a CPU, logits of 128 still lie in memory that malloc keeps.
    """
    if device.type == "cpu":
        return _CHUNK_CPU
    return min(1024, max(128, _CHUNK_BYTES // (2 * vocabulary) // 64 * 64))


def distillation_loss(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    teacher: Teacher | None,
    *,
    objective: Objective,
    weight: torch.Tensor | None = None,
    tokens: float,
    chunk: int = _CHUNK_CPU,
) -> Loss:
    """Loss of N answer positions: `hidden` [N, H] → `head` → logits [n, V]; `labels` int64 [N].

    `tokens` divides the sums: the answer tokens of the whole accumulated batch. N = 0 gives 0 and zero gradients.
    `weight` [V, H] says that `head` is that matrix and nothing more, and frozen: then the one-pass way is taken.
    Raises ArtifactError as Teacher.check does, on a CPU.
    """
    if objective.kl_weight == 0:
        teacher = None
    if hidden.shape[0] == 0 or (objective.ce_weight == 0 and teacher is None):
        zero = hidden.sum() * 0.0
        return Loss(zero.float(), zero.detach().float(), zero.detach().float())
    apply: Any
    if weight is not None and not weight.requires_grad:
        apply = _OnePass.apply
        total, ce, divergence = apply(hidden, weight, labels, teacher, objective, chunk)
        return Loss(total / tokens, ce / tokens, divergence / tokens)

    def of_chunk(states: torch.Tensor, part: slice) -> Any:
        known = None if teacher is None else Teacher(teacher.ids[part], teacher.logprobs[part])
        return _FromLogits.apply(head(states), labels[part], known, objective)  # type: ignore[no-untyped-call]

    parts = []
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        parts.append(checkpoint(of_chunk, hidden[part], part, use_reentrant=False))
    total, ce, divergence = (torch.stack(sums).sum() / tokens for sums in zip(*parts, strict=True))
    return Loss(total, ce, divergence)


# --- The two routes. `total` has the gradient, the other sums have none of their own.


class _OnePass(torch.autograd.Function):
    """Loss and its gradient with respect to `hidden` in one pass over the head, as Liger's fused losses do."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        teacher: Teacher | None,
        objective: Objective,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            # Once: a frozen matrix would be cast anew at every use.
            weight = weight.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            exact = _exact(weight.dtype)
            kernels = _kernels(device, weight.dtype)
            known = None if teacher is None else _prepare(teacher, objective, weight.shape[0], exact)
            gradient = torch.empty_like(hidden, dtype=weight.dtype)
            # Buffers for all chunks: a CPU takes longer to get fresh memory than to fill it.
            product = weight.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
            room = objective.ce_weight > 0 and kernels is None
            softmax = torch.empty_like(product, dtype=exact) if room else None
            # A GPU reads 16-bit logits at half the cost, a CPU converts them one by one wherever they are used.
            wide = None if product.dtype == exact or device != "cpu" else torch.empty_like(product, dtype=exact)
            sums = []
            for start in range(0, hidden.shape[0], chunk):
                states = hidden[start : start + chunk].to(weight.dtype)
                n, part = len(states), slice(start, start + len(states))
                logits = torch.mm(states, weight.T, out=product[:n])
                logits = logits if wide is None else wide[:n].copy_(logits)
                of_part = known and known.part(part)
                if kernels is not None:
                    ce, divergence = _take_slope_by_kernels(kernels, logits, labels[part], of_part, objective)
                else:
                    room_here = None if softmax is None else softmax[:n]
                    ce, divergence = _take_slope(logits, labels[part], of_part, objective, room_here)
                by_logit = logits if wide is None else product[:n].copy_(logits)
                torch.mm(by_logit, weight, out=gradient[part])
                sums.append(torch.stack([ce, divergence]))
            ce, divergence = torch.stack(sums).sum(0)
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.unit = hidden.dtype, _unit(objective)
        return _outputs(ctx, ce, divergence, objective)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.to(ctx.dtype) * (gradients[0] * ctx.unit), None, None, None, None, None


class _FromLogits(torch.autograd.Function):
    """The same from logits [n, V] of any head, whose own gradient autograd forms."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, teacher: Teacher | None, objective: Objective
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            known = None if teacher is None else _prepare(teacher, objective, logits.shape[-1], _exact(logits.dtype))
            # A copy: the head may need its logits for its own gradient.
            by_logit = logits.clone()
            softmax = torch.empty_like(logits, dtype=_exact(logits.dtype)) if objective.ce_weight > 0 else None
            ce, divergence = _take_slope(by_logit, labels, known, objective, softmax)
        ctx.save_for_backward(by_logit)
        ctx.unit = _unit(objective)
        return _outputs(ctx, ce, divergence, objective)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (by_logit,) = ctx.saved_tensors
        return by_logit * (gradients[0] * ctx.unit), None, None, None


def _outputs(
    ctx: Any, ce: torch.Tensor, divergence: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = objective.ce_weight * ce + objective.kl_weight * objective.temperature**2 * divergence
    ctx.mark_non_differentiable(ce, divergence)
    return total, ce, divergence


def _kernels(device: str, dtype: torch.dtype) -> Any:
    """loss_kernels on a GPU; None on a CPU, and in float64, which the kernels do not know."""
    if device != "cuda" or dtype == torch.float64:
        return None
    from toolchain.student import loss_kernels

    return loss_kernels


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unit(objective: Objective) -> float:
    """Gradients by logit are formed in this unit, which saves CE's softmax a pass to be weighted."""
    return objective.ce_weight or 1.0


# --- From logits to value and slope: all work on [n, V].


@dataclass(frozen=True)
class _Known:
    """The teacher's buckets at N positions; the tail is the last."""

    ids: torch.Tensor
    """int64 [N, K]; an empty slot repeats the likeliest id"""
    empty: torch.Tensor
    """bool [N, K]"""
    p: torch.Tensor
    """[N, K + 1]; 0 in empty slots"""
    log_p: torch.Tensor
    """[N, K + 1]; −inf in empty slots"""

    def part(self, of: slice) -> "_Known":
        return _Known(self.ids[of], self.empty[of], self.p[of], self.log_p[of])


def _prepare(teacher: Teacher, objective: Objective, vocabulary: int, exact: torch.dtype) -> _Known:
    if teacher.ids.device.type == "cpu":
        teacher.check(vocabulary)
    empty = teacher.logprobs == -math.inf
    # An empty slot must not hide the logit of a token that is in the tail.
    likeliest = teacher.ids.gather(-1, teacher.logprobs.argmax(-1, keepdim=True))
    ids = torch.where(empty, likeliest, teacher.ids)
    kept = teacher.logprobs.double()
    # In float64, since 1 − mass cancels; rounding may leave a mass a little above 1.
    tail = (1.0 - kept.exp().sum(-1, keepdim=True)).clamp(min=0.0)
    p = torch.cat([kept.exp(), tail], -1)
    log_tail = tail.clamp(min=TAIL_FLOOR if objective.divergence == "reverse_kl" else 0.0).log()
    return _Known(ids, empty, p.to(exact), torch.cat([kept, log_tail], -1).to(exact))


def _take_slope(
    logits: torch.Tensor,
    labels: torch.Tensor,
    known: _Known | None,
    objective: Objective,
    softmax: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ΣCE and ΣD; the loss's gradient by logit, in units of `_unit`, takes the place of `logits` [n, V].

    `softmax` [n, V] is room for CE's part, None without CE. D's part takes the room of `logits`. Where these have 16
    bits, it takes as much again in float32, as torch.softmax has taken and given back for CE.

    With s = q · ∂D/∂q over the buckets, the gradient by the buckets' logits is e = s − q Σs, the softmax's Jacobian; a
    token of the tail gets its share of the tail's e.
    """
    exact = _exact(logits.dtype)
    ce = divergence = logits.new_zeros((), dtype=exact)
    if softmax is not None:
        ce = _cross_entropy(logits, labels, softmax)
    if known is None:
        logits.copy_(softmax)  # type: ignore[arg-type]
        return ce, divergence

    temperature = objective.temperature
    kept = (logits.gather(-1, known.ids).to(exact) / temperature).masked_fill_(known.empty, -math.inf)
    logits.scatter_(-1, known.ids, -math.inf)
    # By the tail's own maximum: by that of all, or as 1 − kept mass, a small tail would be lost.
    shift = (logits.amax(-1, keepdim=True).to(exact) / -temperature).clamp_(max=1e30)
    tail = torch.add(shift, logits, alpha=1 / temperature, out=logits if logits.dtype == exact else None).exp_()
    mass = tail.sum(-1, keepdim=True)
    divergence, error = _by_bucket(torch.cat([kept, mass.log() - shift], -1), known, objective)
    by_kept, by_share = error[:, :-1], error[:, -1:] / mass.clamp(min=torch.finfo(exact).tiny)

    if softmax is None:
        logits.copy_(tail.mul_(by_share).scatter_add_(-1, known.ids, by_kept))
    else:
        torch.addcmul(softmax.scatter_add_(-1, known.ids, by_kept), tail, by_share, out=logits)
    return ce, divergence


def _take_slope_by_kernels(
    kernels: Any, logits: torch.Tensor, labels: torch.Tensor, known: _Known | None, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_take_slope`, without room for a softmax: see loss_kernels."""
    temperature = objective.temperature
    ce = divergence = logits.new_zeros((), dtype=torch.float32)
    label = logits.gather(-1, labels[:, None]).squeeze(-1).float()
    if known is None:
        log_total, _ = kernels.log_sums(logits, 1.0)
        kernels.write_slope(logits, labels, log_total, None, None, 1.0)
        return (log_total - label).sum(), divergence
    kept = logits.gather(-1, known.ids).float().masked_fill_(known.empty, -math.inf)
    logits.scatter_(-1, known.ids, -math.inf)
    log_rest, log_tail = kernels.log_sums(logits, temperature)
    divergence, error = _by_bucket(torch.cat([kept / temperature, log_tail[:, None]], -1), known, objective)
    by_kept, by_tail = error[:, :-1], error[:, -1].contiguous()
    log_total = None
    if objective.ce_weight > 0:
        log_total = torch.logaddexp(log_rest, kept.logsumexp(-1))
        ce = (log_total - label).sum()
        by_kept = by_kept + (kept - log_total[:, None]).exp() - ((known.ids == labels[:, None]) & ~known.empty).float()
    kernels.write_slope(logits, labels, log_total, log_tail, by_tail, temperature)
    logits.scatter_add_(-1, known.ids, by_kept.to(logits.dtype))  # to zeros; what empty slots add is 0
    return ce, divergence


def _by_bucket(z: torch.Tensor, known: "_Known", objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """ΣD, and its slope by the logit of each bucket in units of `_unit`, from the student's logits / T [n, K + 1].

    The tail is the last bucket; −inf is a student without one (k = V, or only padding, at −inf, is left): what the
    teacher has there is rounding.
    """
    log_q = z.log_softmax(-1)
    p = known.p.clone()
    p[:, -1:].masked_fill_(z[:, -1:] == -math.inf, 0.0)
    buckets = _Buckets(p, known.log_p, log_q.exp(), log_q)
    value, slope = _DIVERGENCES[objective.divergence](buckets, objective)
    error = torch.addcmul(slope, buckets.q, slope.sum(-1, keepdim=True), value=-1)
    error *= objective.kl_weight * objective.temperature / _unit(objective)  # T² · ∂(z/T)/∂z
    return value.sum(), error


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, softmax: torch.Tensor) -> torch.Tensor:
    """The sum over the positions; softmax − onehot is written to `softmax`."""
    label = logits.gather(-1, labels[:, None]).to(softmax.dtype)
    torch.softmax(logits, -1, dtype=softmax.dtype, out=softmax)
    # logsumexp from the largest entries: that of a label may be 0 in float32.
    total = logits.amax(-1, keepdim=True).to(softmax.dtype) - softmax.amax(-1, keepdim=True).log()
    softmax.scatter_add_(-1, labels[:, None], torch.full_like(label, -1.0))
    return (total - label).sum()


# --- The divergences: terms of the value, and q · ∂D/∂q up to a multiple of q, both [n, K + 1].


@dataclass(frozen=True)
class _Buckets:
    """Probabilities of teacher (p) and student (q), [n, K + 1], both 0 in empty slots."""

    p: torch.Tensor
    log_p: torch.Tensor
    q: torch.Tensor
    log_q: torch.Tensor


def _times(share: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """share · factor, and 0 where the share is 0, whatever the factor is. NaN stays NaN."""
    return torch.where(share == 0, 0.0, share * factor)


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(share · a + (1 − share) · b)"""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _forward_kl(on: _Buckets, _: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    return _times(on.p, on.log_p - on.log_q), -on.p


def _reverse_kl(on: _Buckets, _: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    terms = _times(on.q, on.log_q - on.log_p)
    return terms, terms


def _jsd(on: _Buckets, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    beta = objective.jsd_beta
    log_m = _log_mixture(on.log_p, on.log_q, beta)
    of_student = _times(on.q, on.log_q - log_m) * (1 - beta)
    return _times(on.p, on.log_p - log_m) * beta + of_student, of_student


def _skew_kl(on: _Buckets, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    log_m = _log_mixture(on.log_p, on.log_q, objective.skew)
    of_student = (on.log_q + math.log1p(-objective.skew) - log_m).exp()
    return _times(on.p, on.log_p - log_m), -_times(on.p, of_student)


def _skew_reverse_kl(on: _Buckets, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    log_m = _log_mixture(on.log_q, on.log_p, objective.skew)
    terms = _times(on.q, on.log_q - log_m)
    of_student = (on.log_q + math.log(objective.skew) - log_m).exp()
    return terms, terms - _times(on.q, of_student)


def _tvd(on: _Buckets, _: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    difference = on.q - on.p
    return difference.abs() / 2, on.q * difference.sign() / 2


_DIVERGENCES: dict[Divergence, Callable[[_Buckets, Objective], tuple[torch.Tensor, torch.Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
}
