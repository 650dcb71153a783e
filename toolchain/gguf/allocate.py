"""Which quantization type each tensor gets: a multiple-choice knapsack. Numbers in, a plan out.

The loss of a tensor at a type is what the model's KL to its 16-bit form grows by, with that tensor quantized and no
other; losses are taken to add up. The budgets are bytes, and the time that decoding takes, of all tensors together.
"""

import math
from collections.abc import Collection, Mapping
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
    time: float = 0.0
    """Of decoding a token, in any unit, additive."""


def plan_loss(options: Mapping[str, Mapping[str, Option]], plan: Plan) -> float:
    return sum(options[name][kind].loss for name, kind in plan.items())


def plan_time(options: Mapping[str, Mapping[str, Option]], plan: Plan) -> float:
    return sum(options[name][kind].time for name, kind in plan.items())


def solve(options: Mapping[str, Mapping[str, Option]], budget: int, time: float = math.inf) -> Plan:
    """The plan of least loss within `budget` bytes and `time`: Lagrange's bound, then what still fits, the best first.

    Raises ValueError where even the smallest types are more than the budget. Where no plan within it is as fast as
    `time`, the fastest that was found.
    """
    plan = _within_bytes(options, budget)
    if plan_time(options, plan) <= time:
        return plan
    # A price on time, from one at which all losses of a step are nothing.
    low, high = 0.0, 1e6 * sum(max(o.loss for o in kinds.values()) for kinds in options.values()) / max(time, 1e-12)
    plan = _within_bytes(_priced(options, high), budget)
    for _ in range(40):
        middle = math.sqrt(low * high) if low else high / 1e9
        tried = _within_bytes(_priced(options, middle), budget)
        if plan_time(options, tried) <= time:
            plan, high = tried, middle
        else:
            low = middle
    return plan


def _priced(options: Mapping[str, Mapping[str, Option]], price: float) -> dict[str, dict[str, Option]]:
    return {
        name: {kind: Option(kind, o.bytes, o.loss + price * o.time, o.time) for kind, o in kinds.items()}
        for name, kinds in options.items()
    }


def _within_bytes(options: Mapping[str, Mapping[str, Option]], budget: int) -> Plan:
    """Options that another one beats in bytes and loss are never taken."""
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


@dataclass(frozen=True)
class Exchange:
    """Bytes moved from some tensors to one other."""

    changes: Plan
    gain: float
    """Loss saved, as the options have it."""


def exchanges(
    options: Mapping[str, Mapping[str, Option]], plan: Plan, room: int, *, without: Collection[tuple[str, str]] = ()
) -> list[Exchange]:
    """Exchanges that gain, the best first; each tensor is in one at most, so that all of them can be made at once. One
    may need the room that another makes.

    `room` is what the plan leaves of the budget; steps (tensor, type) of `without` are not taken.
    """
    now = {name: options[name][kind] for name, kind in plan.items()}
    steps = [
        (option.bytes - now[name].bytes, now[name].loss - option.loss, name, option.kind)
        for name, kinds in options.items()
        for option in kinds.values()
        if option.kind != plan[name] and (name, option.kind) not in without
    ]
    # The cheapest loss for the bytes that it frees comes first; what frees bytes and loses nothing, before all.
    downs = sorted((step for step in steps if step[0] < 0), key=lambda step: step[1] / step[0])
    ups = sorted((step for step in steps if step[1] > 0), key=lambda step: -step[1] / max(step[0], 1))
    found: list[Exchange] = []
    used: set[str] = set()
    for grown, gain, name, kind in ups:
        if name in used:
            continue
        left, changes, net = room - grown, {name: kind}, gain
        for freed, lost, other, smaller in downs:
            if left >= 0:
                break
            if other not in used and other not in changes:
                changes[other] = smaller
                left -= freed
                net += lost
        if left >= 0 and net > 0:
            found.append(Exchange(changes, net))
            used |= changes.keys()
            room = left
    return sorted(found, key=lambda exchange: -exchange.gain)
