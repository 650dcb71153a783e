"""The knapsack behind error-aware types: never over the budget, never worse than it need be."""

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.gguf.allocate import Option, exchanges, plan_loss, plan_time, solve

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


def test_a_plan_is_no_slower_than_it_may_be() -> None:
    def kinds(*times: float) -> dict[str, Option]:
        return {
            kind: Option(kind, size, loss, time)
            for (kind, size, loss), time in zip((("s", 10, 4.0), ("f", 10, 5.0), ("l", 20, 0.0)), times, strict=True)
        }

    options = {"a": kinds(3.0, 1.0, 2.0), "b": kinds(3.0, 1.0, 2.0)}
    assert sorted(solve(options, 30).values()) == ["l", "s"]
    plan = solve(options, 30, 3.0)
    assert sorted(plan.values()) == ["f", "l"]
    assert plan_time(options, plan) == 3.0
    # Where nothing is as fast as asked for: the fastest.
    assert list(solve(options, 30, 1.0).values()) == ["f", "f"]


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


@given(tables, st.integers(0, 60), st.randoms(use_true_random=False))
def test_exchanges_can_all_be_made_at_once_and_gain_what_they_say(
    table: dict[str, dict[str, tuple[int, float]]], room: int, random: Random
) -> None:
    options = options_of(table)
    plan = {name: random.choice(sorted(kinds)) for name, kinds in options.items()}
    found = exchanges(options, plan, room)
    names = [name for exchange in found for name in exchange.changes]
    assert len(names) == len(set(names))
    assert all(exchange.gain > 0 for exchange in found)
    assert found == sorted(found, key=lambda exchange: -exchange.gain)
    after = plan | {name: kind for exchange in found for name, kind in exchange.changes.items()}
    assert size_of(options, after) <= size_of(options, plan) + room
    gain = plan_loss(options, plan) - plan_loss(options, after)
    assert gain == pytest.approx(sum(exchange.gain for exchange in found), abs=1e-9)


def test_an_exchange_moves_bytes_from_where_they_matter_least_and_refused_steps_are_left_out() -> None:
    kinds = {"small": (10, 4.0), "large": (20, 0.0)}
    options = options_of({"a": {"small": (10, 0.1), "large": (20, 0.0)}, "b": kinds, "c": kinds})
    plan = {"a": "large", "b": "small", "c": "large"}
    (exchange,) = exchanges(options, plan, 0)
    assert exchange.changes == {"b": "large", "a": "small"}
    assert exchange.gain == pytest.approx(3.9)
    assert exchanges(options, plan, 0, without={("a", "small")}) == []
