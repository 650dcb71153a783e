"""Quality gates: limits of the recipe against the ledger. A new limit measures nothing anew."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from toolchain.settings import Settings

JUDGED_BY = {"kl_to_teacher": "KL to the teacher", "cross_entropy": "cross-entropy of the held-out answers"}
"""What a ledger judges distillation by: the second where teacher and student share no token ids."""


class GateLimits(Settings):
    """The limits, from the recipe. KL in nats per answer token, averaged over the held-out answers."""

    distill_max_kl_ratio: float
    distill_max_ce_ratio: float
    merge_max_kl: float
    convert_max_kl: float


@dataclass(frozen=True)
class Gate:
    """One limit and the value that was measured against it."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        # Written so that a NaN fails.
        return self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.3g}, limit {self.limit:.3g}"


def check_gates(ledger: dict[str, Any], limits: GateLimits) -> list[Gate]:
    """Every gate with its value, from a ledger as `evaluate` writes it."""
    rows = {row["name"]: row for row in ledger["rows"]}
    judged_by = ledger["gain"]["judged_by"]
    before, after = rows["student before"][judged_by], rows["student after"][judged_by]
    limit = limits.distill_max_kl_ratio if judged_by == "kl_to_teacher" else limits.distill_max_ce_ratio
    return [
        Gate(f"{JUDGED_BY[judged_by]} after ÷ before distillation", _ratio(after, before), limit),
        Gate("KL(adapter ‖ merged)", rows["merged"]["kl_to_previous"], limits.merge_max_kl),
        Gate("KL(merged ‖ 16-bit GGUF)", rows["GGUF 16-bit"]["kl_to_previous"], limits.convert_max_kl),
    ]  # fmt: skip


def _ratio(after: float, before: float) -> float:
    if before:
        return after / before
    return math.inf if after else 0.0


def failed_gates(gates: list[Gate]) -> list[Gate]:
    return [gate for gate in gates if not gate.passed]
