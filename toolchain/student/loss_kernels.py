"""What the distillation loss does to [n, V] logits on an NVIDIA GPU: two kernels that read them three times in all.

Written with the operators of torch, the same takes some thirty launches a chunk and two further arrays of float32
[n, V]: on a host whose processor is slow the launches cost more than the work. losses.py says what is computed; numbers
are loaded as they are (16 bits or 32), worked on in float32, and rounded once when stored.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(logits, peaks, sums, tempered, width, stride, inverse, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    peak = float("-inf")
    total = 0.0
    warm = 0.0
    for at in range(0, width, BLOCK):
        column = at + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z))
        # A row, or what was read of it, may be -inf all over.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift))
        warm = warm * tl.exp((peak - shift) * inverse) + tl.sum(tl.exp((z - shift) * inverse))
        peak = higher
    tl.store(peaks + row, peak)
    tl.store(sums + row, total)
    tl.store(tempered + row, warm)


@triton.jit  # type: ignore[untyped-decorator]
def _write_rows(  # type: ignore[no-untyped-def]
    logits, labels, log_totals, log_tails, shares, width, stride, inverse,
    CROSS_ENTROPY: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    where = logits + row.to(tl.int64) * stride + column
    z = tl.load(where, mask=column < width, other=float("-inf")).to(tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    if CROSS_ENTROPY:
        slope += tl.exp(z - tl.load(log_totals + row))
        # The label's own logit is -inf where it is among the kept ids, which are written elsewhere.
        slope -= tl.where((column == tl.load(labels + row)) & (z > float("-inf")), 1.0, 0.0)
    if TAIL:
        log_tail = tl.load(log_tails + row)
        slope += tl.load(shares + row) * tl.exp(z * inverse - tl.where(log_tail == float("-inf"), 0.0, log_tail))
    tl.store(where, slope.to(logits.dtype.element_ty), mask=column < width)


def log_sums(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log Σ exp z and log Σ exp z/T of each row of `logits` [n, V], float32 [n]; −inf where all of a row is −inf."""
    n, width = logits.shape
    peaks, sums, tempered = (logits.new_empty(n, dtype=torch.float32) for _ in range(3))
    _sum_rows[(n,)](
        logits, peaks, sums, tempered, width, logits.stride(0), 1 / temperature, BLOCK=_BLOCK, num_warps=8
    )  # fmt: skip
    return peaks + sums.log(), peaks / temperature + tempered.log()


def write_slope(
    logits: torch.Tensor,
    labels: torch.Tensor,
    log_total: torch.Tensor | None,
    log_tail: torch.Tensor | None,
    by_tail: torch.Tensor | None,
    temperature: float,
) -> None:
    """Put the slope by each logit in its place: softmax − onehot, plus the tail's slope shared out in the tail.

    `labels` int64 [n]; `log_total` [n], the log of the softmax's denominator, None without cross-entropy; `log_tail`
    [n] at `temperature` and `by_tail` [n], the slope by the tail's logit, None without a teacher. Where a logit is −inf
    the slope is 0.
    """
    n, width = logits.shape
    unused = labels
    _write_rows[(n, triton.cdiv(width, _BLOCK))](
        logits, labels,
        unused if log_total is None else log_total,
        unused if log_tail is None else log_tail,
        unused if by_tail is None else by_tail,
        width, logits.stride(0), 1 / temperature,
        CROSS_ENTROPY=log_total is not None, TAIL=log_tail is not None, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
