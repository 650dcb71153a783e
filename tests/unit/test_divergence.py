"""KL of whole distributions, in float32 against float64."""

import numpy as np
import numpy.typing as npt
import pytest

from toolchain.evaluate.divergence import Reference, kl

Doubles = npt.NDArray[np.float64]


def normalized(logits: npt.NDArray[np.float32]) -> Doubles:
    wide = logits.astype(np.float64)
    found: Doubles = wide - np.logaddexp.reduce(wide, -1, keepdims=True)
    return found


@pytest.mark.parametrize("change", [0.0, 1e-3, 1e-2, 0.5, 5.0])
@pytest.mark.parametrize(("vocabulary", "error"), [(3, 5e-7), (50_000, 2e-8)])
def test_kl_is_right_where_it_is_small_beside_the_rounding_of_its_terms(
    change: float, vocabulary: int, error: float
) -> None:
    random = np.random.default_rng(0)
    logits = (random.normal(0, 3, (6, vocabulary)) - 12).astype(np.float32)
    other = logits + (change * random.normal(0, 1, logits.shape)).astype(np.float32)
    log_p, log_q = normalized(logits), normalized(other)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    narrow = log_p.astype(np.float32), log_q.astype(np.float32)
    for found in (kl(*narrow), kl(*narrow, p=np.exp(narrow[0]))):
        # Log-probabilities are rounded to float32: by 1e-6 at most, and alike for all tokens of a position.
        assert found == pytest.approx(expected, rel=1e-3, abs=5e-7)
    assert Reference(logits).kl(other.copy()) == pytest.approx(expected, rel=1e-3, abs=error)


def test_kl_of_halves_and_quarters() -> None:
    """Σ p log₂(p / q) by hand: (½·1 + ¼·(−1) + ¼·0) bits one way, (¼·(−1) + ½·1 + ¼·0) the other."""
    p, q = (np.log(np.array([values], np.float32)) for values in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
    assert kl(p, q) == pytest.approx([0.25 * np.log(2)])
    assert Reference(p).kl(q.copy()) == pytest.approx([0.25 * np.log(2)])
    sure, unsure = np.log(np.array([[1.0 - 1e-6, 1e-6]])), np.log(np.array([[0.5, 0.5]]))
    assert kl(sure.astype(np.float32), unsure.astype(np.float32))[0] == pytest.approx(np.log(2), rel=1e-4)
    assert kl(unsure.astype(np.float32), sure.astype(np.float32))[0] == pytest.approx(6.2146, rel=1e-4)
