"""The knapsack behind error-aware types: never over the budget, never worse than it need be."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.gguf.allocate import Option, plan_loss, solve

Options = dict[str, dict[str, Option]]


def options_of(table: dict[str, dict[str, tuple[int, float]]]) -> Options:
    return {
        name: {kind: Option(kind, size, loss) for kind, (size, loss) in kinds.items()} for name, kinds in table.items()
    }


def size_of(options: Options, plan: dict[str, str]) -> int:
    return sum(options[name][kind].bytes for name, kind in plan.items())


def best(options: Options, budget: int) -> float:
    """By trying all."""
    plans = (dict(zip(options, kinds, strict=True)) for kinds in itertools.product(*options.values()))
    return min(plan_loss(options, plan) for plan in plans if size_of(options, plan) <= budget)


def test_bytes_go_where_they_save_most() -> None:
    kinds = {"small": (10, 4.0), "large": (20, 0.0)}
    options = options_of({"insensitive": {"small": (10, 0.1), "large": (20, 0.0)}, "sensitive": kinds})
    assert solve(options, 30) == {"insensitive": "small", "sensitive": "large"}
    assert solve(options, 40) == {"insensitive": "large", "sensitive": "large"}
    assert solve(options, 29) == {"insensitive": "small", "sensitive": "small"}


def test_a_budget_below_the_smallest_types_is_an_error() -> None:
    with pytest.raises(ValueError, match="the smallest types take 20 bytes of 19"):
        solve(options_of({"a": {"s": (10, 1.0)}, "b": {"s": (10, 1.0), "l": (20, 0.0)}}), 19)


tables = st.dictionaries(
    st.sampled_from("abcde"),
    st.dictionaries(
        st.sampled_from("pqrs"), st.tuples(st.integers(1, 40), st.floats(0, 10, allow_subnormal=False)), min_size=1
    ),
    min_size=1,
)


@given(tables, st.integers(0, 60))
def test_a_plan_fits_and_is_not_far_from_the_best_there_is(
    table: dict[str, dict[str, tuple[int, float]]], more: int
) -> None:
    options = options_of(table)
    budget = sum(min(option.bytes for option in kinds.values()) for kinds in options.values()) + more
    plan = solve(options, budget)
    assert plan.keys() == options.keys()
    assert size_of(options, plan) <= budget
    # No step that fits is left that gains.
    room = budget - size_of(options, plan)
    for name, kind in plan.items():
        now = options[name][kind]
        assert all(o.loss >= now.loss or o.bytes - now.bytes > room for o in options[name].values())
    # Lagrange's gap: at most what one tensor can save.
    most = max(max(o.loss for o in kinds.values()) - min(o.loss for o in kinds.values()) for kinds in options.values())
    assert plan_loss(options, plan) <= best(options, budget) + most + 1e-9
