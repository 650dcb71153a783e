"""Scores of the lm-evaluation-harness tasks in this folder: a row and what the model gave → figures of that row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.evaluate.answer_scores import exact_match, token_f1


def answer_scores(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`results` is the one answer. The scores that `compare` uses, against the answer of the data set."""
    (answer,) = results
    return {"token_f1": token_f1(answer, row["answer"]), "exact_match": exact_match(answer, row["answer"])}


def likelihood(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`results` is the log-likelihood of the answer, in nats. Per byte it does not depend on the tokenizer."""
    ((nats, _),) = results
    return {"bits_per_byte": -nats / math.log(2) / len(row["answer"].encode())}
