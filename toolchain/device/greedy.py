"""Greedy answers to the golden prompts: recorded where the bundle is built, held against the server's where it runs.

Kernels for another processor round otherwise: of two tokens that are nearly as likely the other one may win, and from
there on the text is another. So each recorded token is asked for after the recorded ones before it, and weighs as much
as the second likeliest token was behind it: a near-tie that flips weighs next to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .client import Client, Messages

SCHEMA_VERSION = 1
TOKENS = 32
"""Of each answer, at most."""
LEAST_SHARE = 0.95
"""Of the recorded tokens, by weight: docs/device.md says what was seen."""
_FURTHEST = 5.0
"""Nats. What is further apart weighs no more: a few tokens that no model doubts should not decide alone."""


@dataclass(frozen=True)
class Answer:
    """The first tokens of an answer, eos included, and how far behind the second likeliest was at each, in nats."""

    ids: list[int]
    margins: list[float]


def ask(client: Client, messages: Messages, max_tokens: int) -> Answer:
    """An answer as it is recorded. Raises DeviceError and OSError."""
    tokens = client.chat(messages, temperature=0, seed=0, max_tokens=max_tokens, logprobs=True, top_logprobs=2)[
        "tokens"
    ]
    return Answer([int(token["id"]) for token in tokens], [_margin(token["top_logprobs"]) for token in tokens])


def _margin(likeliest: Sequence[dict[str, Any]]) -> float:
    first, second = (float(token["logprob"]) for token in likeliest)
    return round(min(first - second, _FURTHEST), 2)


def compare(
    client: Client, prompts: Sequence[Sequence[int]], recorded: dict[str, Any], own: Sequence[Sequence[int]]
) -> tuple[bool, str]:
    """Whether the server chooses the recorded tokens, and how many. Raises DeviceError and OSError.

    `own` are the server's own answers: as far as they are the recorded ones, nothing is asked again.
    """
    answers, made_by = recorded["answers"], recorded["made_by"]
    tokens = sum(len(answer["ids"]) for answer in answers)
    weight = sum(sum(answer["margins"]) for answer in answers)
    asked = chosen = whole = 0
    lost, most = 0.0, (1 - LEAST_SHARE) * weight
    for prompt, answer, said in zip(prompts, answers, own, strict=True):
        alike = _alike(answer["ids"], said)
        whole += alike == len(answer["ids"])
        for at, (token, margin) in enumerate(zip(answer["ids"], answer["margins"], strict=True)):
            if lost > most:
                break  # it cannot pass any more
            same = at < alike or client.next_id([*prompt, *answer["ids"][:at]]) == token
            asked, chosen, lost = asked + 1, chosen + same, lost + (0.0 if same else margin)
    shown = "broken off: " if asked < tokens else ""
    shown += f"{chosen} of {asked} recorded tokens, {1 - lost / weight if weight else 1:.1%} by weight"
    by = f"{made_by['library']} on {made_by['processor']}"
    return lost <= most, f"{shown}, {LEAST_SHARE:.0%} needed; {whole} of {len(answers)} answers whole; recorded by {by}"


def _alike(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many are the same at the beginning of both."""
    shorter = min(len(ids), len(others))
    return next((at for at in range(shorter) if ids[at] != others[at]), shorter)
