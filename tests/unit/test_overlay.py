"""KL of whole distributions, in float32 against float64."""

import numpy as np
import pytest

from toolchain.gguf import overlay


@pytest.mark.parametrize("change", [0.0, 1e-3, 1e-2, 0.5])
def test_kl_is_right_where_it_is_small_beside_the_rounding_of_its_terms(change: float) -> None:
    random = np.random.default_rng(0)
    logits = (random.normal(0, 3, (6, 50_000)) - 12).astype(np.float32)
    other = logits + (change * random.normal(0, 1, logits.shape)).astype(np.float32)
    log_p, log_q = (
        values.astype(np.float64) - np.logaddexp.reduce(values.astype(np.float64), -1, keepdims=True)
        for values in (logits, other)
    )
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    p, entropy = overlay._probabilities(logits)
    assert overlay._kl(p, entropy, other.copy()) == pytest.approx(expected, rel=1e-3, abs=2e-8)
