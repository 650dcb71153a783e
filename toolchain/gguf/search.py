"""Which type each tensor of a 16-bit GGUF should get under a budget of bytes, by what the model loses.

1. For every tensor and type: the squared error of its weights, each column weighed by the importance matrix.
2. For every tensor: KL of the model to its 16-bit form with this tensor at 4 bits and the rest as it was. Its loss at
   another type is this KL, scaled by the ratio of the errors: KL is quadratic in a small change of the weights.
3. A knapsack over these losses (`allocate`), in no more bytes than the budget and no more decoding time than stock.
4. Losses add up only roughly. The whole plan is applied and its true KL measured; then the losses of a group of tensors
   (a role, a depth, a type) are scaled, the knapsack solved again, and what lowers the true KL is kept. From the better
   of that plan and stock's on, types are exchanged between tensors, many at once and then fewer, on true KL alone.

Steps 2 and 4 read different rows, and neither reads held-out ones.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from toolchain.data.rows import Row
from toolchain.errors import DataError
from toolchain.gguf.allocate import Exchange, Option, Plan, exchanges, plan_loss, plan_time, solve
from toolchain.gguf.ggml import Floats, Quantizer, block_width, row_bytes
from toolchain.gguf.header import Tensor
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.gguf.overlay import Divergence, Overlay, open_overlay
from toolchain.journal import Journal
from toolchain.reporter import Reporter, bar

DECODING = {
    "Q2_K": 1.37, "Q3_K": 1.37, "IQ3_S": 1.8, "Q4_0": 0.98, "Q4_1": 1.55, "IQ4_NL": 0.98, "Q4_K": 1.0, "IQ4_XS": 1.4,
    "Q5_0": 1.73, "Q5_1": 1.95, "Q5_K": 1.49, "Q6_K": 1.38, "Q8_0": 1.73,
}  # fmt: skip
"""Time that a weight of the type takes in decoding, Q4_K being 1: llama-bench on 88 M parameters, 2 cores with AVX-512
(docs/quantization.md); Q2_K, IQ3_S, Q4_0 and Q4_1 by an earlier, rougher measurement, scaled to it. A plan must not be
slower than stock by these."""
ANCHORS = ("Q4_K", "IQ4_NL")
"""Type at which a tensor's own KL is measured: the first whose block fits its rows."""
_ROWS = 16_384
"""Rows of a tensor that are rounded at a time: a large vocabulary's would fill the memory."""
_FACTORS = (2.0, 1.3)
"""A group's losses are multiplied and divided by these, in turns."""
_EXCHANGES = 16
"""Most exchanges of types that are tried at once."""


@dataclass(frozen=True)
class Found:
    """What the search came to."""

    plan: Plan
    kl: float
    """True mean KL to 16-bit of the plan on the search's rows, nats per answer token; weights are rounded, activations
    are not."""
    stock_kl: float
    """The same for the types that llama-quantize would choose."""
    predicted_kl: float
    """Sum of the plan's losses."""
    sensitivity: dict[str, float]
    """Per tensor: KL with it alone at its anchor type."""
    trials: int
    """Whole plans that were measured."""
    tokens: tuple[int, int]
    """Answer tokens of step 2 and of step 4."""


class _Weights:
    """The overlay's tensors at any type, as an engine would read them."""

    def __init__(self, overlay: Overlay, quantizer: Quantizer, importance: Mapping[str, Floats]) -> None:
        self.overlay, self._quantizer, self._importance = overlay, quantizer, importance

    def errors(self, name: str, kinds: Sequence[str]) -> dict[str, float]:
        """Sum of the squared errors of the weights at each type, each column weighed by its importance."""
        return {
            kind: sum(
                float(((rounded - original) ** 2).sum(0, dtype=float) @ weights)
                for _, original, rounded, weights in self._rounded(name, kind)
            )
            for kind in kinds
        }

    def apply(self, name: str, kind: str) -> None:
        for part, _, rounded, _ in self._rounded(name, kind):
            self.overlay.write(name, rounded, part)

    def _rounded(self, name: str, kind: str) -> Iterator[tuple[slice, Floats, Floats, Floats]]:
        """Some rows after others, as they are and as `kind` holds them, with the importance of their columns."""
        rows, width = self.overlay.shape(name)
        given = self._importance.get(name)
        by_expert = None if given is None else given.reshape(-1, width)
        per_expert = rows if by_expert is None else rows // len(by_expert)
        for start in range(0, rows, per_expert):
            weights = None if by_expert is None else by_expert[start // per_expert]
            for at in range(start, start + per_expert, _ROWS):
                part = slice(at, min(at + _ROWS, start + per_expert))
                original = self.overlay.original(name, part)
                rounded = self._quantizer.round_trip(kind, original, weights)
                yield part, original, rounded, np.ones(width, np.float32) if weights is None else weights


def choose(
    gguf: Path,
    *,
    stock: Mapping[str, str],
    shapes: Mapping[str, Tensor],
    kinds: Sequence[str],
    budget: int,
    importance: Mapping[str, Floats],
    rows: Sequence[Row],
    tokens: int,
    trials: int,
    llama: LlamaCpp,
    journal: Journal,
    report: Reporter,
) -> Found:
    """The plan for the tensors of `stock` (types by llama-quantize, quantized ones only) within `budget` bytes.

    `tokens` answer tokens in each of two sets of rows are scored. Raises DataError for too few rows, ModelError.
    """
    first, second = draw(rows, tokens)
    with open_overlay(gguf, llama=llama) as overlay:
        weights = _Weights(overlay, Quantizer(llama), importance)
        usable = {name: usable_kinds(shapes[name].shape[0], kinds, stock[name]) for name in stock}
        errors = _errors(weights, usable, journal, report)
        sensitivity = _sensitivities(weights, usable, first, llama, journal, report)
        looked_up = {"token_embd.weight"} if "output.weight" in shapes else set()
        options = {
            name: {
                kind: Option(
                    kind,
                    _bytes(kind, shapes[name]),
                    sensitivity[name] * errors[name][kind] / max(errors[name][anchor(usable[name])], 1e-300),
                    # Rows of an embedding that is not the head as well are looked up, one a token.
                    0.0 if name in looked_up else DECODING[kind] * shapes[name].elements / 1e6,
                )
                for kind in usable[name]
            }
            for name in stock
        }
        with _divergence(overlay, second, llama) as divergence:
            trial = _Trial(weights, divergence, journal)
            stock_kl = trial.kl(dict(stock))
            plan, kl = _improve(options, dict(stock), budget, trial, trials, report)
    return Found(
        plan=plan,
        kl=kl,
        stock_kl=stock_kl,
        predicted_kl=plan_loss(options, plan),
        sensitivity=sensitivity,
        trials=trial.measured,
        tokens=(sum(len(row.answer_ids) for row in first), sum(len(row.answer_ids) for row in second)),
    )


def bytes_of(plan: Mapping[str, str], shapes: Mapping[str, Tensor]) -> int:
    """What the tensors of a plan take in a file."""
    return sum(_bytes(kind, shapes[name]) for name, kind in plan.items())


def smallest_bytes(stock: Mapping[str, str], shapes: Mapping[str, Tensor], kinds: Sequence[str]) -> int:
    """What these tensors take at the smallest type that each may have."""
    return sum(
        min(_bytes(kind, shapes[name]) for kind in usable_kinds(shapes[name].shape[0], kinds, own))
        for name, own in stock.items()
    )


def _bytes(kind: str, tensor: Tensor) -> int:
    """In the file, where each tensor starts at a multiple of 32."""
    width = tensor.shape[0]
    return -(-row_bytes(kind, width) * (tensor.elements // width) // 32) * 32


def usable_kinds(width: int, kinds: Sequence[str], own: str) -> tuple[str, ...]:
    """Types whose block divides rows of `width`; where 256 does, Q5_K is better than Q5_0 and Q5_1 in no more bytes."""
    fitting = [kind for kind in kinds if width % block_width(kind) == 0]
    if "Q5_K" in fitting:
        fitting = [kind for kind in fitting if kind not in {"Q5_0", "Q5_1"}]
    return tuple(dict.fromkeys([*fitting, own]))


def anchor(kinds: Sequence[str]) -> str:
    return next((kind for kind in ANCHORS if kind in kinds), kinds[0])


def draw(rows: Sequence[Row], tokens: int) -> tuple[list[Row], list[Row]]:
    """Two sets of rows with about `tokens` answer tokens each, from all over the list; fewer rows give smaller sets."""
    if len(rows) < 2:
        raise DataError(f"{len(rows)} training rows: the search for types needs two at least")
    total = sum(len(row.answer_ids) for row in rows)
    share = min(1.0, 2 * tokens / total)
    taken = rows if share == 1 else [rows[int(at / share)] for at in range(max(2, int(len(rows) * share)))]
    return list(taken[0::2]), list(taken[1::2])


@contextlib.contextmanager
def _divergence(overlay: Overlay, rows: Sequence[Row], llama: LlamaCpp) -> Iterator[Divergence]:
    divergence = Divergence(overlay, rows, llama=llama)
    try:
        yield divergence
    finally:
        divergence.close()


def _errors(
    weights: _Weights, usable: Mapping[str, Sequence[str]], journal: Journal, report: Reporter
) -> dict[str, dict[str, float]]:
    found = {}
    with bar(report, "errors of each type", total=len(usable), unit="tensor") as task:
        for name, kinds in usable.items():
            found[name] = journal.once(f"error {name}", partial(weights.errors, name, kinds))
            task.advance()
    return found


def _sensitivities(
    weights: _Weights,
    usable: Mapping[str, Sequence[str]],
    rows: Sequence[Row],
    llama: LlamaCpp,
    journal: Journal,
    report: Reporter,
) -> dict[str, float]:
    def alone(scored: Callable[[], Divergence], name: str) -> float:
        divergence = scored()
        weights.apply(name, anchor(usable[name]))
        kl = float(divergence.measure().mean())
        weights.overlay.restore(name)
        # Rounding may take it below 0 where nothing is lost.
        return max(kl, 0.0)

    with (
        contextlib.ExitStack() as stack,
        bar(report, "sensitivity of each tensor", total=len(usable), unit="tensor") as task,
    ):
        # Scoring what all is compared with takes a while: not where a run before this one has done it all.
        scored = cache(lambda: stack.enter_context(_divergence(weights.overlay, rows, llama)))
        found = {}
        for name in usable:
            found[name] = float(journal.once(f"kl {name}", partial(alone, scored, name)))
            task.advance()
    return found


class _Trial:
    """The true KL of whole plans; what was measured before is not measured again."""

    def __init__(self, weights: _Weights, divergence: Divergence, journal: Journal) -> None:
        self._weights, self._divergence, self._journal = weights, divergence, journal
        self._applied: Plan = {}
        self.measured = 0

    def kl(self, plan: Plan) -> float:
        self.measured += 1
        key = "plan " + " ".join(f"{name}={kind}" for name, kind in sorted(plan.items()))

        def measure() -> float:
            for name, kind in plan.items():
                if self._applied.get(name) != kind:
                    self._weights.apply(name, kind)
                    self._applied[name] = kind
            return float(self._divergence.measure().mean())

        return float(self._journal.once(key, measure))


def _improve(
    options: Mapping[str, Mapping[str, Option]],
    stock: Plan,
    budget: int,
    trial: "_Trial",
    trials: int,
    report: Reporter,
) -> tuple[Plan, float]:
    """The plan of least true KL that was found, within the budget, and that KL."""
    time = plan_time(options, stock)
    plan = solve(options, budget, time)
    best = trial.kl(plan)
    with bar(report, "trying whole plans", total=trials, unit="plan") as task:

        def better(other: Plan, what: str) -> bool:
            nonlocal plan, best
            task.advance()
            found = trial.kl(other)
            if found >= best:
                return False
            plan, best = other, found
            report.line(f"KL {best:.5f} with {what}")
            return True

        factors = _scale_groups(options, budget, time, plan, better, trials=trials // 2)
        scaled = _scaled(options, factors)
        if _bytes_of(options, stock) <= budget:
            better(dict(stock), "the stock types")
        _exchange(scaled, budget, time, lambda: plan, better, trials=trials - trials // 2)
    return plan, best


def _scale_groups(
    options: Mapping[str, Mapping[str, Option]],
    budget: int,
    time: float,
    plan: Plan,
    better: Callable[[Plan, str], bool],
    *,
    trials: int,
) -> dict["_Key", float]:
    """Scale the losses of one group after another, as long as the knapsack's answer to it is better; the factors."""
    groups = _groups(options)
    factors: dict[_Key, float] = {}
    seen = [plan]
    for size in _FACTORS:
        for label, keys in groups.items():
            for factor in (size, 1 / size):
                if trials == 0:
                    return factors
                changed = factors | {key: factors.get(key, 1.0) * factor for key in keys}
                other = solve(_scaled(options, changed), budget, time)
                if other in seen:
                    continue
                seen.append(other)
                trials -= 1
                if better(other, f"{label} × {factor:.2f}"):
                    factors = changed
                    break
    return factors


def _exchange(
    options: Mapping[str, Mapping[str, Option]],
    budget: int,
    time: float,
    plan: Callable[[], Plan],
    better: Callable[[Plan, str], bool],
    *,
    trials: int,
) -> None:
    """Exchange types between tensors: many at once, half as many where that does not help, twice as many where it does.
    A single exchange that does not help is not tried again."""
    refused: set[_Key] = set()
    size = _EXCHANGES
    for _ in range(trials):
        now = plan()
        found = exchanges(options, now, budget - _bytes_of(options, now), without=refused)
        taken: list[Exchange] = []
        other = now
        for exchange in found:
            changed = other | exchange.changes
            # One that is left out may have been what made room for the next.
            if len(taken) < size and plan_time(options, changed) <= time and _bytes_of(options, changed) <= budget:
                taken.append(exchange)
                other = changed
        if not taken:
            return
        if better(other, f"{len(taken)} exchanges"):
            size = 2 * len(taken)
        else:
            if len(taken) == 1:
                refused |= set(taken[0].changes.items())
            size = max(1, len(taken) // 2)


def _bytes_of(options: Mapping[str, Mapping[str, Option]], plan: Plan) -> int:
    return sum(options[name][kind].bytes for name, kind in plan.items())


_Key = tuple[str, str]
"""Tensor and type."""


def _groups(options: Mapping[str, Mapping[str, Option]]) -> dict[str, set[_Key]]:
    """Sets of options whose losses may be wrong in the same way, by a name for a person."""
    groups: dict[str, set[_Key]] = {}
    layers = [int(found[1]) for name in options if (found := re.match(r"blk\.(\d+)\.", name))]
    depth = max(layers, default=0) + 1
    for name, kinds in options.items():
        found = re.match(r"blk\.(\d+)\.(.+)", name)
        keys = {(name, kind) for kind in kinds}
        groups.setdefault((found[2] if found else name).removesuffix(".weight"), set()).update(keys)
        if found:
            part = ("first", "second", "third", "last")[int(found[1]) * 4 // depth]
            groups.setdefault(f"the {part} quarter of the layers", set()).update(keys)
        for kind in kinds:
            groups.setdefault(kind, set()).add((name, kind))
    # One group of all options is no choice.
    whole = sum(len(kinds) for kinds in options.values())
    return {label: keys for label, keys in groups.items() if len(keys) < whole}


def _scaled(options: Mapping[str, Mapping[str, Option]], factors: Mapping[_Key, float]) -> dict[str, dict[str, Option]]:
    return {
        name: {
            kind: Option(kind, option.bytes, option.loss * factors.get((name, kind), 1.0), option.time)
            for kind, option in kinds.items()
        }
        for name, kinds in options.items()
    }


def render(plan: Plan) -> str:
    """The plan as llama-quantize --tensor-type-file reads it: a line for each tensor, regular expression = type."""
    return "".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in sorted(plan.items()))
