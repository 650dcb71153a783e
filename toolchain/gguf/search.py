"""Which type each tensor of a 16-bit GGUF should get under a budget of bytes, by what the model loses.

1. For every tensor and type: the squared error of its weights, each column weighed by the importance matrix, on some of
   its rows.
2. For every tensor: KL of the model to its 16-bit form with this tensor at 4 bits and the rest as it was. Its loss at
   another type is this KL, scaled by the ratio of the errors: KL is quadratic in a small change of the weights.
3. A knapsack over these losses (`allocate`), in no more bytes than the budget and no more decoding time than stock.
4. Losses add up only roughly. From the better of that plan and stock's on, types are exchanged between tensors, many at
   once and then fewer, on the true KL of whole plans. A plan is measured beside the best one so far, row by row; it is
   given up where it falls behind, and taken where it is ahead beyond doubt.

Step 2 reads some rows, step 4 more of others, and neither reads held-out ones.
"""

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

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
_SAMPLE = 128
"""Rows, of each expert, that tell a type's error: the ratio of two types hardly differs from row to row."""
_KEPT_BYTES = 1 << 30
"""Memory for tensors as they were quantized: doing that again costs as much as scoring a thousand tokens."""
_LEAST_TOKENS, _SHARE = 512, 4
"""Step 2 reads a quarter of the answer tokens of step 4, and not less than so many where step 4 does not either:
more of them hardly change the plan (docs/quantization.md)."""
_LOOK = 4
"""Batches between two looks at whether a plan is behind: the same on any machine, or its search would differ."""
_SURE = 2.0
"""Standard errors by which a plan must be ahead. Without them, plans were taken that did well on the search's rows by
chance, and lost on others a fifteenth of what the knapsack had gained (docs/quantization.md)."""
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
    """Whole plans that were measured, wholly or until they were seen to be worse."""
    tokens: tuple[int, int]
    """Answer tokens of step 2 and of step 4."""


class _Weights:
    """The overlay's tensors at any type, as an engine would read them."""

    def __init__(self, overlay: Overlay, quantizer: Quantizer, importance: Mapping[str, Floats]) -> None:
        self.overlay, self._quantizer, self._importance = overlay, quantizer, importance
        self._kept: dict[tuple[str, str, int], npt.NDArray[np.uint8]] = {}
        """Rows from a start on as blocks of a type; what was used last comes last."""

    def errors(self, name: str, kinds: Sequence[str]) -> dict[str, float]:
        """Sum of the squared errors of a sample of the rows at each type, each column weighed by its importance."""
        found = dict.fromkeys(kinds, 0.0)
        for part, weights in self._experts(name):
            sample = slice(part.start, part.stop, max(1, (part.stop - part.start) // _SAMPLE))
            original = self.overlay.original(name, sample)
            columns = np.ones(original.shape[1], np.float32) if weights is None else weights
            for kind in kinds:
                rounded = self._quantizer.round_trip(kind, original, weights)
                found[kind] += float(((rounded - original) ** 2).sum(0, dtype=float) @ columns)
        return found

    def apply(self, name: str, kind: str) -> None:
        for expert, weights in self._experts(name):
            for start in range(expert.start, expert.stop, _ROWS):
                part = slice(start, min(start + _ROWS, expert.stop))
                self.overlay.write(name, self._quantizer.read(kind, self._blocks(name, kind, part, weights)), part)

    def _blocks(self, name: str, kind: str, part: slice, weights: Floats | None) -> npt.NDArray[np.uint8]:
        key = (name, kind, part.start)
        blocks = self._kept.pop(key, None)
        if blocks is None:
            blocks = self._quantizer.quantize(kind, self.overlay.original(name, part), weights)
        self._kept[key] = blocks
        while sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
            del self._kept[next(iter(self._kept))]
        return blocks

    def _experts(self, name: str) -> Iterator[tuple[slice, Floats | None]]:
        """Each expert's rows, or all, and the importance of their columns where there is any."""
        rows, width = self.overlay.shape(name)
        given = self._importance.get(name)
        by_expert = [None] if given is None else list(given.reshape(-1, width))
        size = rows // len(by_expert)
        for at, weights in enumerate(by_expert):
            yield slice(at * size, (at + 1) * size), weights


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

    `tokens` answer tokens tell whole plans apart, fewer others what each tensor loses. Raises DataError for too few
    rows, ModelError.
    """
    first, second = draw(rows, tokens)
    with open_overlay(gguf, llama=llama) as overlay:
        weights = _Weights(overlay, Quantizer(llama), importance)
        usable = {name: usable_kinds(shapes[name].shape[0], kinds, stock[name]) for name in stock}
        errors = _errors(weights, usable, journal, report)
        with _Alone(weights, first, llama, journal) as alone:
            sensitivity = _sensitivities(alone, usable, report)
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
            plan = _improve(options, dict(stock), budget, trial, trials, report)
            kl = trial.kl(plan)
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
    """Two sets of rows from all over the list, in no order: for single tensors, and for whole plans with about `tokens`
    answer tokens. Fewer rows give smaller sets."""
    if len(rows) < 2:
        raise DataError(f"{len(rows)} training rows: the search for types needs two at least")
    single = max(min(tokens, _LEAST_TOKENS), tokens // _SHARE)
    total = sum(len(row.answer_ids) for row in rows)
    share = min(1.0, (single + tokens) / total)
    taken = rows if share == 1 else [rows[int(at / share)] for at in range(max(2, int(len(rows) * share)))]
    taken = Random(0).sample(list(taken), len(taken))  # noqa: S311 - nothing secret
    first = min(max(1, round(len(taken) * single / (single + tokens))), len(taken) - 1)
    return taken[:first], taken[first:]


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


class _Alone:
    """KL of the model with one tensor at a type and the rest as it was."""

    def __init__(self, weights: _Weights, rows: Sequence[Row], llama: LlamaCpp, journal: Journal) -> None:
        self._weights, self._journal = weights, journal
        self._open = contextlib.ExitStack()
        # Scoring what all is compared with takes a while: not where a run before this one has done it all.
        self._divergence = cache(lambda: self._open.enter_context(_divergence(weights.overlay, rows, llama)))

    def __enter__(self) -> "_Alone":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def kl(self, name: str, kind: str) -> float:
        return float(self._journal.once(f"kl {name}", partial(self._measure, name, kind)))

    def _measure(self, name: str, kind: str) -> float:
        divergence = self._divergence()
        self._weights.apply(name, kind)
        kl = float(divergence.measure().mean())
        self._weights.overlay.restore(name)
        # Rounding may take it below 0 where nothing is lost.
        return max(kl, 0.0)


def _sensitivities(alone: _Alone, usable: Mapping[str, Sequence[str]], report: Reporter) -> dict[str, float]:
    found = {}
    with bar(report, "sensitivity of each tensor", total=len(usable), unit="tensor") as task:
        for name, kinds in usable.items():
            found[name] = alone.kl(name, anchor(kinds))
            task.advance()
    return found


class _Trial:
    """The true KL of whole plans; what was measured before is not measured again."""

    def __init__(self, weights: _Weights, divergence: Divergence, journal: Journal) -> None:
        self._weights, self._divergence, self._journal = weights, divergence, journal
        self._applied: Plan = {}
        self._looks = [slice(at, at + _LOOK) for at in range(0, divergence.batches, _LOOK)]
        self._seen: set[str] = set()

    @property
    def measured(self) -> int:
        return len(self._seen)

    def kl(self, plan: Plan) -> float:
        """Mean over all answer tokens."""
        return sum(float(self._rows(plan, look).sum()) for look in self._looks) / sum(self._divergence.row_lengths())

    def beats(self, plan: Plan, best: Plan) -> bool:
        """Whether `plan` loses less, beyond doubt; measured no further than it is ahead."""
        difference = np.empty(0)
        for look in self._looks:
            difference = np.append(difference, self._rows(plan, look) - self._rows(best, look))
            if difference.mean() >= 0:
                return False
        return bool(difference.mean() < -_SURE * _standard_error(difference))

    def _rows(self, plan: Plan, look: slice) -> npt.NDArray[np.float64]:
        """KL of each row of some batches, summed over its answer tokens."""
        text = " ".join(f"{name}={kind}" for name, kind in sorted(plan.items()))
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._seen.add(digest)

        def measure() -> list[float]:
            for name, kind in plan.items():
                if self._applied.get(name) != kind:
                    self._weights.apply(name, kind)
                    self._applied[name] = kind
            ends = np.cumsum(self._divergence.row_lengths(look))[:-1]
            return [float(row.sum()) for row in np.split(self._divergence.measure(look), ends)]

        return np.array(self._journal.once(f"plan {digest} from batch {look.start}", measure))


def _standard_error(values: npt.NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _improve(
    options: Mapping[str, Mapping[str, Option]],
    stock: Plan,
    budget: int,
    trial: _Trial,
    trials: int,
    report: Reporter,
) -> Plan:
    """The plan of least true KL that was found, within the budget."""
    time = plan_time(options, stock)
    plan = solve(options, budget, time)
    if _bytes_of(options, stock) <= budget and trial.beats(stock, plan):
        plan = stock
    report.line(f"KL {trial.kl(plan):.5f} {'as stock' if plan == stock else 'by the losses of single tensors'}")
    with bar(report, "trying whole plans", total=trials, unit="plan") as task:

        def better(other: Plan, what: str) -> bool:
            nonlocal plan
            task.advance()
            if not trial.beats(other, plan):
                return False
            plan = other
            report.line(f"KL {trial.kl(plan):.5f} with {what}")
            return True

        _exchange(options, budget, time, lambda: plan, better, trials=trials)
    return plan


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


def render(plan: Plan) -> str:
    """The plan as llama-quantize --tensor-type-file reads it: a line for each tensor, regular expression = type."""
    return "".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in sorted(plan.items()))
