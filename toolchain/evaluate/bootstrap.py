"""Paired bootstrap: how sure is the difference of two models that answered the same questions?

Percentile intervals (Efron 1979, "Bootstrap methods: another look at the jackknife"; Efron, Tibshirani 1993, ch. 13).
Questions are drawn with replacement and keep both of their scores, so that what makes a question hard for both models
does not widen the interval. It says how far the figure depends on the choice of questions, and on nothing else: neither
on the seed of the training nor on questions of another kind. Below some 30 questions it is too narrow.

The samples of two benchmarks are no pairs: `ratio_interval` draws each side by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """Mean of after − before, and its interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_differences(
    before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], *, resamples: int, seed: int
) -> list[Difference]:
    """One Difference for each score; `before` and `after` are [scores, questions], one column being one question.

    All scores are resampled with the same draws. Raises ValueError for shapes that do not fit, no question, or a score
    that is not finite.
    """
    found = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    if found.ndim != 2 or found.shape[1] == 0 or np.shape(before) != np.shape(after):
        raise ValueError(f"scores of shapes {np.shape(before)} and {np.shape(after)}: not the same questions, or none")
    if not np.isfinite(found).all():
        raise ValueError("a score is not finite")
    random = np.random.default_rng(seed)
    questions = found.shape[1]
    means = np.stack([found[:, random.integers(0, questions, questions)].mean(axis=1) for _ in range(resamples)])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return [Difference(*map(float, row)) for row in zip(found.mean(axis=1), low, high, strict=True)]


def paired_interval(
    differences: npt.NDArray[np.float64], weights: npt.NDArray[np.int64], *, seed: int = 0
) -> tuple[float, float] | None:
    """Interval of the weighted mean of `differences`, one per held-out row.

    None with fewer than two rows.
    """
    count = len(differences)
    if count < 2:
        return None
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    means = (drawn @ (weights * differences)) / (drawn @ weights)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def ratio_interval(before: Sequence[float], after: Sequence[float], *, seed: int) -> tuple[float, float] | None:
    """Interval of median(after) ÷ median(before), for samples that are not pairs: each side is drawn by itself.

    All samples of `before` are above 0. None with fewer than two of them on a side.
    """
    if min(len(before), len(after)) < 2:
        return None
    random = np.random.default_rng(seed)
    below, above = (
        np.median(np.asarray(samples, np.float64)[random.integers(0, len(samples), (RESAMPLES, len(samples)))], axis=1)
        for samples in (before, after)
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(above / below, (tail, 1 - tail))
    return float(low), float(high)
