"""The distillation loss against a dense float64 reference, written from the definitions: values and gradients."""

import math
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

from torch.profiler import ProfilerActivity, profile

from toolchain.errors import ArtifactError
from toolchain.recipe import Distill
from toolchain.student.losses import TAIL_FLOOR, Divergence, Loss, Objective, Teacher, distillation_loss, pick_chunk

VOCABULARY, WIDTH, POSITIONS = 37, 8, 11
NAMES: tuple[Divergence, ...] = get_args(Divergence)
ROUTES = pytest.mark.parametrize("one_pass", [False, True], ids=["any head", "one pass"])
EACH = pytest.mark.parametrize("name", NAMES)
COUNTS = torch.tensor([1, 2, 3, 5, 8, 13, 20, 30, 36, 37, 4])


def _objective(
    name: Divergence = "forward_kl",
    *,
    temperature: float = 2.0,
    ce: float = 0.5,
    kl: float = 0.5,
    beta: float = 0.3,
    skew: float = 0.1,
) -> Objective:
    return Objective(temperature, ce, kl, name, beta, skew)


def _inputs(
    spread: float = 2.0, seed: int = 0
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Hidden states [N, H], head [V, H], labels [N], teacher logits [N, V], all float64 but the labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    teacher = torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64) * spread
    return hidden, weight, labels, teacher


def _top(teacher: "torch.Tensor", temperature: float, counts: "torch.Tensor") -> Teacher:
    """The likeliest `counts[i]` ids of each position; empty slots hold id 0, as the reader leaves them."""
    logprobs, ids = (teacher / temperature).log_softmax(-1).sort(-1, descending=True)
    width = int(counts.max())
    empty = torch.arange(width) >= counts[:, None]
    return Teacher(ids[:, :width].masked_fill(empty, 0), logprobs[:, :width].masked_fill(empty, -math.inf))


def _kl(a: "torch.Tensor", b: "torch.Tensor") -> "torch.Tensor":
    there = a > 0
    return (a[there] * (a[there] / b[there]).log()).sum()


def _of(p: "torch.Tensor", q: "torch.Tensor", objective: Objective) -> "torch.Tensor":
    beta, skew = objective.jsd_beta, objective.skew
    match objective.divergence:
        case "forward_kl":
            return _kl(p, q)
        case "reverse_kl":
            return _kl(q, p)
        case "jsd":
            return beta * _kl(p, beta * p + (1 - beta) * q) + (1 - beta) * _kl(q, beta * p + (1 - beta) * q)
        case "skew_kl":
            return _kl(p, skew * p + (1 - skew) * q)
        case "skew_reverse_kl":
            return _kl(q, skew * q + (1 - skew) * p)
        case "tvd":
            return (p - q).abs().sum() / 2


def _dense(logits: "torch.Tensor", labels: "torch.Tensor", top: Teacher, objective: Objective) -> "torch.Tensor":
    """The sum over the positions, one by one: kept ids, then all others in one bucket."""
    total = objective.ce_weight * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    for at in range(len(labels)):
        q = (logits[at] / objective.temperature).softmax(-1)
        filled = top.logprobs[at] > -math.inf
        ids = top.ids[at][filled]
        p = top.logprobs[at][filled].double().exp()
        rest = torch.ones(logits.shape[-1], dtype=torch.bool)
        rest[ids] = False
        q_kept = q[ids]
        if rest.any() and q[rest].sum() > 0:
            p_rest = (1 - p.sum()).clamp(min=TAIL_FLOOR if objective.divergence == "reverse_kl" else 0.0)
            p, q_kept = torch.cat([p, p_rest[None]]), torch.cat([q_kept, q[rest].sum()[None]])
        total = total + objective.kl_weight * objective.temperature**2 * _of(p, q_kept, objective)
    return total


def _ours(
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    labels: "torch.Tensor",
    top: Teacher,
    objective: Objective,
    *,
    one_pass: bool,
    chunk: int = 4,
) -> tuple[Loss, "torch.Tensor"]:
    """The loss per position, and its gradient by `hidden`."""
    leaf = hidden.detach().clone().requires_grad_()
    loss = distillation_loss(
        leaf,
        lambda part: part @ weight.T,
        labels,
        top,
        objective=objective,
        weight=weight if one_pass else None,
        tokens=len(labels),
        chunk=chunk,
    )
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return loss, leaf.grad


def _reference(
    hidden: "torch.Tensor", weight: "torch.Tensor", labels: "torch.Tensor", top: Teacher, objective: Objective
) -> tuple[float, "torch.Tensor"]:
    """In float64, from logits that are rounded as a product of the given types is."""
    leaf = hidden.detach().double().requires_grad_()
    logits = leaf @ weight.double().T
    if hidden.dtype == torch.bfloat16:
        logits = logits + (logits.bfloat16().double() - logits).detach()
    total = _dense(logits, labels, top, objective) / len(labels)
    total.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return total.item(), leaf.grad


def _agree(
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    labels: "torch.Tensor",
    top: Teacher,
    objective: Objective,
    *,
    one_pass: bool,
    rel: float = 1e-9,
) -> None:
    expected, slope = _reference(hidden, weight, labels, top, objective)
    loss, gradient = _ours(hidden, weight, labels, top, objective, one_pass=one_pass)
    assert math.isfinite(expected)
    assert loss.total.item() == pytest.approx(expected, rel=rel, abs=rel)
    scale = max(slope.abs().max().item(), 1.0)
    assert torch.allclose(gradient.double(), slope, rtol=rel, atol=rel * scale)


def test_every_divergence_of_the_recipe_has_a_loss_and_no_other() -> None:
    assert set(NAMES) == set(get_args(Distill.model_fields["divergence"].annotation))


@ROUTES
@EACH
@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
@pytest.mark.parametrize(("ce", "kl"), [(0.5, 0.5), (0.0, 1.0)])
def test_value_and_gradient_are_those_of_the_dense_reference(
    name: Divergence, temperature: float, ce: float, kl: float, one_pass: bool
) -> None:
    hidden, weight, labels, teacher = _inputs()
    objective = _objective(name, temperature=temperature, ce=ce, kl=kl)
    _agree(hidden, weight, labels, _top(teacher, temperature, COUNTS), objective, one_pass=one_pass)


@ROUTES
@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.01, 30),
    width=st.floats(0.01, 10),
    temperature=st.floats(0.5, 8),
    share=st.floats(0.01, 0.99),
    ce=st.sampled_from([0.0, 1e-3, 1.0]),
    data=st.data(),
)
def test_random_cases_agree_with_the_dense_reference(
    one_pass: bool,
    name: Divergence,
    seed: int,
    spread: float,
    width: float,
    temperature: float,
    share: float,
    ce: float,
    data: Any,
) -> None:
    hidden, weight, labels, teacher = _inputs(spread, seed)
    counts = torch.tensor(data.draw(st.lists(st.integers(1, VOCABULARY), min_size=POSITIONS, max_size=POSITIONS)))
    objective = _objective(name, temperature=temperature, ce=ce, beta=share, skew=share)
    top = _top(teacher, temperature, counts)
    _agree(hidden * width, weight, labels, top, objective, one_pass=one_pass, rel=1e-8)


@ROUTES
def test_without_a_divergence_it_is_cross_entropy(one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs()
    objective = _objective(ce=1.0, kl=0.0)
    _agree(hidden, weight, labels, _top(teacher, 2.0, COUNTS), objective, one_pass=one_pass)
    loss, _ = _ours(hidden, weight, labels, _top(teacher, 2.0, COUNTS), objective, one_pass=one_pass)
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    assert loss.total.item() == pytest.approx(exact.item(), rel=1e-12)
    assert loss.divergence.item() == 0.0


@ROUTES
@EACH
def test_the_parts_add_up_to_the_total_and_have_no_gradient(name: Divergence, one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs()
    loss, _ = _ours(hidden, weight, labels, _top(teacher, 2.0, COUNTS), _objective(name, ce=0.2), one_pass=one_pass)
    assert (0.2 * loss.ce + 0.5 * 4 * loss.divergence).item() == pytest.approx(loss.total.item(), rel=1e-12)
    assert not loss.ce.requires_grad
    assert not loss.divergence.requires_grad


@EACH
def test_all_ids_kept_is_the_exact_divergence(name: Divergence) -> None:
    hidden, weight, labels, teacher = _inputs()
    top = _top(teacher, 1.0, torch.full((POSITIONS,), VOCABULARY))
    objective = _objective(name, temperature=1.0, ce=0.0, kl=1.0)
    loss, _ = _ours(hidden, weight, labels, top, objective, one_pass=True)
    exact = sum(_of(p, q, objective) for p, q in zip(teacher.softmax(-1), (hidden @ weight.T).softmax(-1), strict=True))
    assert loss.divergence.item() == pytest.approx(float(exact) / POSITIONS, rel=1e-12)


@EACH
def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient(name: Divergence) -> None:
    *_, labels, teacher = _inputs()
    loss, gradient = _ours(
        teacher, torch.eye(VOCABULARY).double(), labels, _top(teacher, 2.0, COUNTS), _objective(name, ce=0.0),
        one_pass=True,
    )  # fmt: skip
    assert abs(loss.total.item()) < 1e-12
    # TVD has a kink there: rounding decides the sign of each difference, and any such slope is a subgradient.
    assert name == "tvd" or gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("near", "name", "beta", "skew"),
    [
        ("forward_kl", "jsd", 1e-8, 0.5),
        ("reverse_kl", "jsd", 1 - 1e-8, 0.5),
        ("forward_kl", "skew_kl", 0.5, 1e-8),
        ("reverse_kl", "skew_reverse_kl", 0.5, 1e-8),
    ],
)
def test_mixtures_have_the_plain_divergences_as_their_limits(
    near: Divergence, name: Divergence, beta: float, skew: float
) -> None:
    hidden, weight, labels, teacher = _inputs(0.5)
    top = _top(teacher, 2.0, COUNTS)
    mixed, by_mixed = _ours(
        hidden, weight, labels, top, _objective(name, ce=0.0, beta=beta, skew=skew), one_pass=True
    )  # fmt: skip
    plain, by_plain = _ours(hidden, weight, labels, top, _objective(near, ce=0.0), one_pass=True)
    grown = min(beta, 1 - beta) if name == "jsd" else 1.0
    assert mixed.divergence.item() / grown == pytest.approx(plain.divergence.item(), rel=1e-3)
    assert torch.allclose(by_mixed / grown, by_plain, rtol=1e-3, atol=1e-4)


@ROUTES
@EACH
def test_small_and_large_tails_are_exact(name: Divergence, one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs()
    logprobs, ids = teacher.log_softmax(-1).topk(4)
    for tail in (1e-12, 1e-6, 1 - 1e-6, 1 - 1e-12):
        top = Teacher(ids, logprobs - logprobs.logsumexp(-1, keepdim=True) + math.log1p(-tail))
        # 1 − Σ p has 16 digits after the point, and a tail of 1e-12 so 4 of its own.
        _agree(hidden, weight, labels, top, _objective(name), one_pass=one_pass, rel=1e-8)


@ROUTES
@EACH
@pytest.mark.parametrize("temperature", [0.5, 8.0])
def test_a_sure_teacher_and_a_student_sure_of_another_token(
    name: Divergence, temperature: float, one_pass: bool
) -> None:
    """float32, as in training: the teacher has all its mass on one token, the student nearly all on another one."""
    at = torch.arange(VOCABULARY)
    for spread, slots in ((1.0, 5), (20.0, 1), (20.0, 5), (20.0, VOCABULARY)):
        hidden = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))
        hidden[at, (at + 1) % VOCABULARY] += spread
        logprobs = torch.full((VOCABULARY, slots), -60.0)
        logprobs[:, 0] = 0.0
        top = Teacher((at[:, None] + 3 * torch.arange(slots)) % VOCABULARY, logprobs)
        labels = (at + 1) % VOCABULARY if slots == 1 else at
        objective = _objective(name, temperature=temperature)
        _agree(hidden, torch.eye(VOCABULARY), labels, top, objective, one_pass=one_pass, rel=2e-5)


def test_reverse_kl_of_a_tail_that_the_teacher_calls_empty_is_bounded() -> None:
    """log q + 15.9 nats: the tail's mass is not known below 2⁻²³."""
    hidden = torch.tensor([[0.0, 200.0, 0.0]])
    top = Teacher(torch.tensor([[0]]), torch.tensor([[0.0]]))
    loss, gradient = _ours(
        hidden, torch.eye(3), torch.tensor([0]), top, _objective("reverse_kl", ce=0.0, temperature=1.0), one_pass=True
    )
    assert loss.divergence.item() == pytest.approx(23 * math.log(2), rel=1e-6)
    assert gradient.isfinite().all()


@EACH
@pytest.mark.parametrize("slots", [1, 4, VOCABULARY - 6])
def test_padded_rows_at_minus_infinity_get_no_mass_and_no_gradient(name: Divergence, slots: int) -> None:
    """The last rows are padding. With VOCABULARY − 6 slots, nothing else is left in the tail."""
    _, _, labels, teacher = _inputs()
    real = VOCABULARY - 6
    top = _top(teacher[:, :real], 2.0, torch.full((POSITIONS,), slots))
    top = Teacher(top.ids, top.logprobs.float())  # rounding: a kept mass that is not quite 1
    logits = torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(3)).double()
    logits[:, real:] = -math.inf
    exact, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    total = _dense(exact, labels % real, top, _objective(name))
    total.backward()  # type: ignore[no-untyped-call]
    loss = distillation_loss(
        ours, lambda part: part, labels % real, top, objective=_objective(name), tokens=1.0, chunk=4
    )  # fmt: skip
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert exact.grad is not None
    assert ours.grad is not None
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-6)
    assert torch.allclose(ours.grad[:, :real], exact.grad[:, :real], rtol=1e-5, atol=1e-6)
    assert not ours.grad[:, real:].any()


@ROUTES
@EACH
def test_an_empty_slot_may_stand_anywhere_and_hold_any_id(name: Divergence, one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs()
    top = _top(teacher, 2.0, torch.full((POSITIONS,), 5))
    holes = Teacher(
        torch.cat([torch.full((POSITIONS, 1), 7), top.ids[:, :2], torch.full((POSITIONS, 2), 11), top.ids[:, 2:]], -1),
        torch.cat([torch.full((POSITIONS, 1), -math.inf), top.logprobs[:, :2], torch.full((POSITIONS, 2), -math.inf),
                   top.logprobs[:, 2:]], -1),
    )  # fmt: skip
    plain, by_plain = _ours(hidden, weight, labels, top, _objective(name), one_pass=one_pass)
    holed, by_holed = _ours(hidden, weight, labels, holes, _objective(name), one_pass=one_pass)
    assert holed.total.item() == pytest.approx(plain.total.item(), rel=1e-12)
    assert torch.allclose(by_plain, by_holed, rtol=1e-10, atol=1e-12)


@ROUTES
@EACH
def test_the_size_of_chunks_does_not_change_the_result(name: Divergence, one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs()
    top = _top(teacher, 2.0, COUNTS)
    one, by_one = _ours(hidden.float(), weight.float(), labels, top, _objective(name), one_pass=one_pass, chunk=5)
    for chunk in (1, 3, 11, 512):
        two, by_two = _ours(
            hidden.float(), weight.float(), labels, top, _objective(name), one_pass=one_pass, chunk=chunk
        )  # fmt: skip
        assert torch.allclose(one.total, two.total, rtol=1e-5)
        assert torch.allclose(by_one, by_two, rtol=1e-4, atol=1e-7)


@ROUTES
@EACH
@pytest.mark.parametrize("temperature", [0.5, 8.0])
def test_loss_and_gradient_stay_finite_in_float32(name: Divergence, temperature: float, one_pass: bool) -> None:
    counts = torch.ones(POSITIONS, dtype=torch.long)
    counts[::2] = VOCABULARY - 1
    for spread in (1e-4, 1.0, 100.0, 1e4):
        hidden, weight, labels, teacher = _inputs(spread)
        top = _top(teacher, temperature, counts)
        # Rounding may leave a kept mass a little above 1.
        top = Teacher(top.ids, top.logprobs.float() + 1e-6)
        objective = _objective(name, temperature=temperature)
        loss, gradient = _ours((hidden * spread).float(), weight.float(), labels, top, objective, one_pass=one_pass)
        assert loss.total.isfinite()
        assert gradient.isfinite().all()


@ROUTES
@EACH
def test_sixteen_bit_states_and_cached_values_are_worked_on_in_float32(name: Divergence, one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs()
    hidden, weight = hidden.bfloat16(), (weight / 4).bfloat16()
    top = _top(teacher, 2.0, torch.full((POSITIONS,), 6))
    top = Teacher(top.ids, top.logprobs.half())
    expected, slope = _reference(hidden, weight, labels, top, _objective(name))
    loss, gradient = _ours(hidden, weight, labels, top, _objective(name), one_pass=one_pass)
    assert gradient.dtype == torch.bfloat16
    assert loss.total.dtype == torch.float32
    # What is left is the rounding of logits and gradients to bfloat16, 2⁻⁹ each.
    assert loss.total.item() == pytest.approx(expected, rel=1e-2)
    assert (gradient.double() - slope).abs().max() < 2e-2 * slope.abs().max()


@EACH
def test_autocast_gives_the_gradient_the_type_of_the_states(name: Divergence) -> None:
    hidden, weight, labels, teacher = _inputs()
    top = _top(teacher, 2.0, COUNTS)
    exact, slope = _reference(hidden, weight, labels, top, _objective(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = _ours(hidden.float(), weight.float(), labels, top, _objective(name), one_pass=True)
    assert gradient.dtype == torch.float32
    assert loss.total.item() == pytest.approx(exact, rel=5e-2)
    assert (gradient - slope).abs().max() < 5e-2 * slope.abs().max()


@EACH
def test_a_trained_head_with_scale_and_softcap_gets_its_gradient(name: Divergence) -> None:
    hidden, weight, labels, teacher = _inputs()
    top = _top(teacher, 2.0, COUNTS)
    slopes: list[tuple[float, torch.Tensor, torch.Tensor]] = []
    for dense in (True, False):
        states, matrix = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def head(part: torch.Tensor, matrix: torch.Tensor = matrix) -> torch.Tensor:
            return torch.tanh(part @ matrix.T * 0.5 / 3.0) * 3.0

        if dense:
            total = _dense(head(states), labels, top, _objective(name)) / POSITIONS
        else:
            total = distillation_loss(
                states, head, labels, top, objective=_objective(name), weight=matrix, tokens=POSITIONS, chunk=4
            ).total
        total.backward()  # type: ignore[no-untyped-call]
        assert states.grad is not None
        assert matrix.grad is not None
        slopes.append((total.item(), states.grad, matrix.grad))
    (value, by_states, by_matrix), (ours, our_states, our_matrix) = slopes
    assert ours == pytest.approx(value, rel=1e-10)
    assert torch.allclose(our_states, by_states, rtol=1e-8, atol=1e-10)
    assert torch.allclose(our_matrix, by_matrix, rtol=1e-8, atol=1e-10)


@ROUTES
def test_a_batch_without_answer_tokens_gives_zero_and_zero_gradients(one_pass: bool) -> None:
    hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    matrix = torch.ones(VOCABULARY, WIDTH)
    loss = distillation_loss(
        hidden[none],
        lambda part: part @ matrix.T,
        torch.zeros(0, dtype=torch.long),
        Teacher(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4)),
        objective=_objective(),
        weight=matrix if one_pass else None,
        tokens=1.0,
    )
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert loss.total.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_logits_of_all_positions_never_exist_at_once() -> None:
    seen: list[int] = []
    hidden, weight, labels, teacher = _inputs()
    hidden.requires_grad_()

    def head(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[0])
        return part @ weight.T

    top = _top(teacher, 2.0, COUNTS)
    loss = distillation_loss(hidden, head, labels, top, objective=_objective(), tokens=11.0, chunk=4)
    assert seen == [4, 4, 3]
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert sorted(seen[3:]) == [3, 4, 4], "the backward pass computes each chunk again"


@ROUTES
@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_an_id_that_the_student_does_not_have_is_named(wrong: int, one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs()
    top = _top(teacher, 2.0, COUNTS)
    top.ids[5, 2] = wrong
    with pytest.raises(ArtifactError, match=f"token id {wrong}; the student's head has ids from 0 to 36"):
        _ours(hidden, weight, labels, top, _objective(), one_pass=one_pass)


@ROUTES
def test_a_teacher_that_is_not_a_number_is_refused(one_pass: bool) -> None:
    hidden, weight, labels, teacher = _inputs()
    top = _top(teacher, 2.0, COUNTS)
    top.logprobs[5, 2] = math.nan
    with pytest.raises(ArtifactError, match="not a number"):
        _ours(hidden, weight, labels, top, _objective(), one_pass=one_pass)


@EACH
def test_nan_is_never_taken_for_an_empty_slot(name: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing is checked, and the loss has to say it."""
    monkeypatch.setattr(Teacher, "check", lambda *_: None)
    hidden, weight, labels, teacher = _inputs()
    top = _top(teacher, 2.0, COUNTS)
    top.logprobs[5, 2] = math.nan
    loss, _ = _ours(hidden, weight, labels, top, _objective(name), one_pass=True)
    assert loss.total.isnan()


@pytest.mark.parametrize(
    ("vocabulary", "chunk"),
    [(512, 1024), (49_152, 1024), (128_256, 1024), (151_936, 832), (262_144, 512), (2_000_000, 128)],
)
def test_chunks_on_a_gpu_hold_256_mib_of_logits_or_128_positions(vocabulary: int, chunk: int) -> None:
    assert pick_chunk(vocabulary, torch.device("cuda")) == chunk
    assert chunk == 128 or 2 * chunk * vocabulary <= 256 * 2**20
    assert pick_chunk(vocabulary, torch.device("cpu")) == 128


@EACH
def test_a_divergence_takes_no_more_memory_than_cross_entropy(name: Divergence) -> None:
    """Two buffers of [chunk, V] in float32, whatever the loss: peaks of the allocator, so the same on every host."""
    vocabulary, chunk, positions = 20_000, 32, 96
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, WIDTH, generator=generator)
    weight = torch.randn(vocabulary, WIDTH, generator=generator)
    logprobs, ids = torch.randn(positions, 50, generator=generator).log_softmax(-1).topk(8)
    labels = ids[:, 0]
    peaks = []
    for kl in (0.0, 0.5):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _ours(hidden, weight, labels, Teacher(ids, logprobs), _objective(name, kl=kl), one_pass=True, chunk=chunk)
        recorded: Any = profiler.profiler
        events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peaks.append(max(accumulate(sizes)) / (4 * chunk * vocabulary))
    assert 2.0 <= peaks[0] < 2.05
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.gpu
def test_a_gpu_gives_what_the_dense_reference_gives() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    for name, one_pass, dtype in product(NAMES, (False, True), (torch.float32, torch.bfloat16)):
        hidden, weight, labels, teacher = _inputs()
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        top = _top(teacher, 2.0, COUNTS)
        expected, slope = _reference(hidden, weight, labels, top, _objective(name))
        on_gpu = Teacher(top.ids.cuda(), top.logprobs.float().cuda())
        loss, gradient = _ours(
            hidden.cuda(), weight.cuda(), labels.cuda(), on_gpu, _objective(name), one_pass=one_pass
        )  # fmt: skip
        rel = 1e-2 if dtype == torch.bfloat16 else 1e-4
        assert loss.total.item() == pytest.approx(expected, rel=rel), (name, one_pass, dtype)
        assert (gradient.cpu().double() - slope).abs().max() < rel * slope.abs().max(), (name, one_pass, dtype)
