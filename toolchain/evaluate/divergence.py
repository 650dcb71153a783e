"""KL(P ‖ Q) of distributions over a vocabulary: the one formula of the parity gates, the ledger and the search."""

import numpy as np
import numpy.typing as npt

Logprobs = npt.NDArray[np.float32]


def kl(log_p: Logprobs, log_q: Logprobs, *, p: Logprobs | None = None) -> npt.NDArray[np.float64]:
    """KL(P ‖ Q) = Σ p (log p − log q) at each position, in nats: float64 [positions].

    Natural log-probabilities over the same tokens, float32 [positions, vocabulary]; summed in float64. `p` is
    exp(log_p), where it is at hand.
    """
    found = np.empty(len(log_p))
    for at, (own, other) in enumerate(zip(log_p, log_q, strict=True)):
        # Position by position, temporaries stay in the cache: 2.6 times as fast as on the whole array.
        found[at] = ((np.exp(own) if p is None else p[at]) * (own - other)).sum(dtype=np.float64)
    return found


class Reference:
    """P of many comparisons with logits that are not normalized: what depends on P alone is computed once."""

    def __init__(self, logits: Logprobs) -> None:
        """`logits`: float32 [positions, vocabulary]. Keeps as many float32 and a float64 for each position."""
        shifted = logits - logits.max(-1, keepdims=True)
        sums = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
        self._p = (np.exp(shifted) / sums).astype(np.float32)
        self._mass = self._p.sum(-1, dtype=np.float64)
        self._entropy = _mean_of(self._p, shifted) - np.log(sums[:, 0]) * self._mass

    def kl(self, logits: Logprobs) -> npt.NDArray[np.float64]:
        """KL(P ‖ Q) as above, where log q = logits − logsumexp. `logits` are used up."""
        logits -= logits.max(-1, keepdims=True)
        cross = _mean_of(self._p, logits)
        sums = np.exp(logits, out=logits).sum(-1, dtype=np.float64)
        found: npt.NDArray[np.float64] = self._entropy - cross + np.log(sums) * self._mass
        return found


def _mean_of(p: Logprobs, values: Logprobs) -> npt.NDArray[np.float64]:
    """Σ p · values of each position. In float32, tens of thousands of terms would leave an error of 4e-5 nats, which is
    more than many a tensor's loss."""
    found: npt.NDArray[np.float64] = (p * values).sum(-1, dtype=np.float64)
    return found
