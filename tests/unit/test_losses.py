"""The distillation loss against a dense float64 reference: values and gradients."""

import math
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

from toolchain.student.losses import Loss, Teacher, distillation_loss, top_k_kl

VOCABULARY, WIDTH, POSITIONS = 37, 8, 11


def _inputs(spread: float = 2.0) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Hidden states [N, H], head [V, H], labels [N], teacher logits [N, V], all float64 but the labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    teacher = torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64) * spread
    return hidden, weight, labels, teacher


def _backward(value: Any) -> None:
    value.backward()


def _gradient(leaf: "torch.Tensor") -> "torch.Tensor":
    assert leaf.grad is not None
    return leaf.grad


def _top(teacher: "torch.Tensor", temperature: float, counts: "torch.Tensor") -> Teacher:
    """The likeliest `counts[i]` ids of each position."""
    logprobs, ids = (teacher / temperature).log_softmax(-1).sort(-1, descending=True)
    width = int(counts.max())
    empty = torch.arange(width) >= counts[:, None]
    # Empty slots hold id 0, as the reader leaves them.
    return Teacher(ids[:, :width].masked_fill(empty, 0), logprobs[:, :width].masked_fill(empty, -math.inf))


def _dense(
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    labels: "torch.Tensor",
    teacher: "torch.Tensor",
    counts: "torch.Tensor",
    temperature: float,
    ce_weight: float,
    kl_weight: float,
) -> "torch.Tensor":
    """By the definition, position by position: kept ids one by one, the others summed to one bucket."""
    logits = hidden @ weight.T
    total = ce_weight * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    p = (teacher / temperature).softmax(-1)
    q = (logits / temperature).softmax(-1)
    for at, count in enumerate(counts.tolist()):
        order = p[at].argsort(descending=True)
        kept, rest = order[:count], order[count:]
        kl = (p[at, kept] * (p[at, kept] / q[at, kept]).log()).sum()
        if len(rest):
            kl = kl + p[at, rest].sum() * (p[at, rest].sum() / q[at, rest].sum()).log()
        total = total + kl_weight * temperature**2 * kl
    return total / len(labels)


ROUTES = pytest.mark.parametrize("one_pass", [False, True], ids=["again in backward", "one pass"])
COUNTS = torch.tensor([1, 2, 3, 5, 8, 13, 20, 30, 36, 37, 4])


@ROUTES
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize(("ce_weight", "kl_weight"), [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_value_and_gradient_are_those_of_the_dense_reference(
    temperature: float, ce_weight: float, kl_weight: float, one_pass: bool
) -> None:
    hidden, weight, labels, teacher = _inputs()
    reference = hidden.clone().requires_grad_()
    expected = _dense(reference, weight, labels, teacher, COUNTS, temperature, ce_weight, kl_weight)
    _backward(expected)
    hidden.requires_grad_()
    loss = distillation_loss(
        hidden,
        lambda part: part @ weight.T,
        labels,
        _top(teacher, temperature, COUNTS),
        weight=weight if one_pass else None,
        temperature=temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        tokens=POSITIONS,
        chunk=4,
    )
    _backward(loss.total)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-10)
    assert torch.allclose(_gradient(hidden), _gradient(reference), rtol=1e-8, atol=1e-10)
    parts = ce_weight * loss.ce + kl_weight * temperature**2 * loss.kl
    assert parts.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not loss.ce.requires_grad
    assert not loss.kl.requires_grad


def test_all_ids_kept_is_the_exact_kl() -> None:
    hidden, weight, _, teacher = _inputs()
    logits = (hidden @ weight.T).log_softmax(-1)
    all_of_it = _top(teacher, 1.0, torch.full((POSITIONS,), VOCABULARY))
    exact = (teacher.softmax(-1) * (teacher.log_softmax(-1) - logits)).sum(-1)
    assert torch.allclose(top_k_kl(logits, all_of_it.ids, all_of_it.logprobs), exact, rtol=1e-12)


def test_a_student_that_is_the_teacher_has_no_kl_and_no_gradient() -> None:
    *_, teacher = _inputs()
    student = teacher.clone().requires_grad_()
    top = _top(teacher, 2.0, COUNTS)
    kl = top_k_kl(student / 2.0, top.ids, top.logprobs)
    _backward(kl.sum())
    assert kl.abs().max() < 1e-12
    assert _gradient(student).abs().max() < 1e-12


@ROUTES
@pytest.mark.parametrize("chunk", [1, 3, 11, 512])
def test_the_size_of_chunks_does_not_change_the_result(chunk: int, one_pass: bool) -> None:
    hidden, weight, labels, teacher = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _inputs())
    results: list[tuple[Loss, torch.Tensor]] = []
    for size in (POSITIONS, chunk):
        leaf = hidden.clone().requires_grad_()
        loss = distillation_loss(
            leaf,
            lambda part: part @ weight.T,
            labels,
            _top(teacher, 2.0, COUNTS),
            weight=weight if one_pass else None,
            temperature=2.0,
            ce_weight=0.3,
            kl_weight=0.7,
            tokens=100.0,
            chunk=size,
        )
        _backward(loss.total)
        results.append((loss, _gradient(leaf)))
    assert torch.allclose(results[0][0].total, results[1][0].total, rtol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


@ROUTES
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 100.0, 1e4])
def test_loss_and_gradient_stay_finite_in_float32(temperature: float, spread: float, one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs(spread)
    hidden = (hidden * spread).float().requires_grad_()
    counts = torch.ones(POSITIONS, dtype=torch.long)
    counts[::2] = VOCABULARY - 1
    top = _top(teacher, temperature, counts)
    # Rounding may leave a kept mass a little above 1.
    top = Teacher(top.ids, top.logprobs.float() + 1e-6)
    loss = distillation_loss(
        hidden,
        lambda part: part @ weight.float().T,
        labels,
        top,
        weight=weight.float() if one_pass else None,
        temperature=temperature,
        ce_weight=0.5,
        kl_weight=0.5,
        tokens=POSITIONS,
    )
    _backward(loss.total)
    assert torch.isfinite(loss.total)
    assert torch.isfinite(_gradient(hidden)).all()


def test_a_batch_without_answer_tokens_gives_zero_and_zero_gradients() -> None:
    hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    loss = distillation_loss(
        hidden[none],
        lambda part: part @ torch.ones(WIDTH, VOCABULARY),
        torch.zeros(0, dtype=torch.long),
        Teacher(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4)),
        temperature=2.0,
        ce_weight=0.5,
        kl_weight=0.5,
        tokens=1.0,
    )
    _backward(loss.total)
    assert loss.total.item() == 0.0
    assert not _gradient(hidden).any()


def test_logits_of_all_positions_never_exist_at_once() -> None:
    seen: list[int] = []
    hidden, weight, labels, teacher = _inputs()
    hidden.requires_grad_()

    def head(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[0])
        return part @ weight.T

    options: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5, "kl_weight": 0.5, "tokens": 11.0, "chunk": 4}
    loss = distillation_loss(hidden, head, labels, _top(teacher, 2.0, COUNTS), **options)
    assert seen == [4, 4, 3]
    _backward(loss.total)
    assert sorted(seen[3:]) == [3, 4, 4], "the backward pass computes each chunk again"
