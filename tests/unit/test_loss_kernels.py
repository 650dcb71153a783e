"""The GPU's kernels against the operators of torch: on a CPU as Triton's interpreter runs them, on a GPU compiled."""

import math
from typing import TYPE_CHECKING, Any, get_args

import pytest

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

from toolchain.student import losses
from toolchain.student.losses import Divergence, Objective, Teacher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES: tuple[Divergence, ...] = get_args(Divergence)
ROWS, SLOTS = 6, 5
# Wider than a block of the kernels, and no multiple of it.
WIDTHS = pytest.mark.parametrize("width", [37, 4096, 9001])


@pytest.fixture(scope="module")
def kernels() -> Any:
    """Compiled where there is a GPU; else interpreted, as tests/conftest.py asks for."""
    from toolchain.student import loss_kernels

    return loss_kernels


def _case(width: int, *, spread: float = 3.0, seed: int = 0) -> tuple["torch.Tensor", "torch.Tensor", Teacher]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(ROWS, width, generator=generator) * spread).to(DEVICE)
    of_teacher, ids = (torch.randn(ROWS, width, generator=generator) * spread).log_softmax(-1).topk(SLOTS)
    of_teacher[1, 3:] = -math.inf  # empty slots
    ids[1, 3:] = 0
    labels = ids[:, 0].clone()
    labels[::2] = (labels[::2] + 1) % width  # half of them outside what the teacher names, most likely
    return logits, labels.to(DEVICE), Teacher(ids.to(DEVICE), of_teacher.to(DEVICE))


def _both(
    kernels: Any, logits: "torch.Tensor", labels: "torch.Tensor", teacher: Teacher | None, objective: Objective
) -> tuple[list["torch.Tensor"], list["torch.Tensor"]]:
    """ΣCE, ΣD and slopes: by torch in float64 from the same logits, and by the kernels."""
    exact = logits.double()

    def known(exactness: "torch.dtype") -> losses._Known | None:
        return None if teacher is None else losses._prepare(teacher, objective, logits.shape[1], exactness)

    softmax = torch.empty_like(exact) if objective.ce_weight > 0 else None
    expected = [*losses._take_slope(exact, labels, known(torch.float64), objective, softmax), exact]
    found = logits.clone()
    return expected, [*losses._take_slope_by_kernels(kernels, found, labels, known(torch.float32), objective), found]


def _agree(expected: list["torch.Tensor"], found: list["torch.Tensor"], *, rel: float) -> None:
    for name, one, other in zip(("CE", "D", "slope"), expected, found, strict=True):
        scale = max(float(one.abs().max()), 1e-3)
        assert float((other.double() - one).abs().max()) < rel * scale, name


@WIDTHS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ce", "kl"), [(0.5, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_kernels_give_what_the_operators_give(
    kernels: Any, name: Divergence, width: int, ce: float, kl: float, temperature: float
) -> None:
    objective = Objective(temperature, ce, kl, name, 0.3, 0.1)
    _agree(*_both(kernels, *_case(width), objective), rel=1e-4)


@WIDTHS
def test_kernels_give_cross_entropy_alone(kernels: Any, width: int) -> None:
    logits, labels, _ = _case(width)
    _agree(*_both(kernels, logits, labels, None, Objective(1.0, 1.0, 0.0, "forward_kl", 0.5, 0.1)), rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_worked_on_in_float32_and_rounded_once(kernels: Any, dtype: "torch.dtype") -> None:
    logits, labels, teacher = _case(9001)
    objective = Objective(2.0, 0.5, 0.5, "forward_kl", 0.5, 0.1)
    _agree(*_both(kernels, logits.to(dtype), labels, teacher, objective), rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", NAMES)
def test_padding_at_minus_infinity_gets_no_slope(kernels: Any, name: Divergence) -> None:
    """A whole block of it, and in one row everything but what the teacher names."""
    logits, labels, teacher = _case(9001)
    logits[:, 4000:] = -math.inf
    ids = teacher.ids % 4000
    ids, _ = ids.sort(-1)
    ids += torch.arange(SLOTS, device=DEVICE)  # none twice
    keep = torch.zeros(9001, dtype=torch.bool, device=DEVICE)
    keep[ids[2]] = True
    logits[2, ~keep] = -math.inf
    labels = ids[:, 1].clone()
    objective = Objective(2.0, 0.5, 0.5, name, 0.5, 0.1)
    expected, found = _both(kernels, logits, labels, Teacher(ids, teacher.logprobs), objective)
    _agree(expected, found, rel=2e-5)
    assert (found[2][:, 4005:] == 0).all()
    assert found[2].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", [1e-3, 60.0])
def test_flat_and_sharp_rows_are_exact(kernels: Any, name: Divergence, spread: float) -> None:
    logits, labels, teacher = _case(5000, spread=spread)
    _agree(*_both(kernels, logits, labels, teacher, Objective(2.0, 0.5, 0.5, name, 0.5, 0.1)), rel=2e-4)


def test_a_logit_that_is_not_a_number_is_not_lost(kernels: Any) -> None:
    logits, labels, teacher = _case(5000)
    logits[3, 77] = math.nan
    for known in (teacher, None):
        ce, _, _ = _both(kernels, logits, labels, known, Objective(2.0, 0.5, 0.5, "forward_kl", 0.5, 0.1))[1]
        assert ce.isnan()
