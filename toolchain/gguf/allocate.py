"""Which quantization type each tensor gets: a multiple-choice knapsack. Numbers in, a plan out.

The loss of a tensor at a type is what the model's KL to its 16-bit form grows by, with that tensor quantized and no
other; losses are taken to add up. The budget is in bytes of all tensors together.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Plan = dict[str, str]
"""Type by tensor name."""


@dataclass(frozen=True)
class Option:
    """One type that a tensor may have."""

    kind: str
    bytes: int
    loss: float
    """Nats per token, additive."""


def plan_loss(options: Mapping[str, Mapping[str, Option]], plan: Plan) -> float:
    return sum(options[name][kind].loss for name, kind in plan.items())


def solve(options: Mapping[str, Mapping[str, Option]], budget: int) -> Plan:
    """The plan of least loss within `budget` bytes: Lagrange's bound, then whatever still fits, the best first.

    Options that another one beats in bytes and loss are never taken. Raises ValueError where even the smallest types
    are more than the budget.
    """
    smallest = {name: min(kinds.values(), key=lambda o: (o.bytes, o.loss)) for name, kinds in options.items()}
    if sum(option.bytes for option in smallest.values()) > budget:
        raise ValueError(f"the smallest types take {sum(o.bytes for o in smallest.values())} bytes of {budget}")

    def at(price: float) -> dict[str, Option]:
        return {
            name: min(kinds.values(), key=lambda o: (o.loss + price * o.bytes, o.bytes))
            for name, kinds in options.items()
        }

    low, high = 0.0, 1.0
    chosen = at(low)
    if sum(option.bytes for option in chosen.values()) > budget:
        while sum(option.bytes for option in at(high).values()) > budget:
            high *= 4
            if high > 1e30:  # equal losses: no price tells them apart
                break
        for _ in range(200):
            middle = (low + high) / 2
            if sum(option.bytes for option in at(middle).values()) > budget:
                low = middle
            else:
                high = middle
        chosen = at(high)
        if sum(option.bytes for option in chosen.values()) > budget:
            chosen = smallest
    return {name: option.kind for name, option in _fill(options, chosen, budget).items()}


def _fill(options: Mapping[str, Mapping[str, Option]], chosen: dict[str, Option], budget: int) -> dict[str, Option]:
    """Take the step with the most gain for its bytes while one fits, then exchanges of one step up for one down."""
    chosen = dict(chosen)
    room = budget - sum(option.bytes for option in chosen.values())
    while True:
        steps = [
            (option.bytes - now.bytes, now.loss - option.loss, name, option)
            for name, now in chosen.items()
            for option in options[name].values()
            if option.kind != now.kind
        ]
        fitting = [step for step in steps if step[1] > 0 and step[0] <= room]
        if fitting:
            # What takes no bytes comes first.
            grown, _, name, option = max(fitting, key=lambda step: step[1] / max(step[0], 1))
            chosen[name] = option
            room -= grown
            continue
        exchange = _best_exchange(steps, room)
        if exchange is None:
            return chosen
        for grown, _, name, option in exchange:
            chosen[name] = option
            room -= grown


_Step = tuple[int, float, str, Option]


def _best_exchange(steps: list[_Step], room: int) -> tuple[_Step, _Step] | None:
    """A step that gains and one that makes room for it, of two tensors, where both together gain the most."""
    ups = sorted((step for step in steps if step[1] > 0), key=lambda step: -step[1])[:200]
    downs = sorted((step for step in steps if step[0] < 0), key=lambda step: -step[1])[:200]
    best, most = None, 0.0
    for up in ups:
        for down in downs:
            gain = up[1] + down[1]
            if gain > most * (1 + 1e-9) + 1e-18 and up[2] != down[2] and up[0] + down[0] <= room:
                best, most = (up, down), gain
    return best
