"""Greedy answers to the golden prompts: recorded where the bundle is built, held against the server's where it runs.

Kernels for another processor round otherwise: of two tokens that are nearly as likely the other one may win, and from
there on the text is another. So each recorded token is asked for after the recorded ones before it, and near-ties are
left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .client import Client, Messages

SCHEMA_VERSION = 1
TOKENS = 32
"""Of each answer, at most."""
NEAR_TIE = 0.5
"""Nats from the likeliest token to the second: below that other kernels may well choose the other one. Of 2,500 tokens
above it none was seen to flip; at most 0.41 was (docs/device.md)."""
LEAST_SHARE = 0.97
"""Of the recorded tokens that were no near-ties."""
_FURTHEST = 20.0
"""Nats; the server's own probabilities end about there."""


@dataclass(frozen=True)
class Answer:
    """The first tokens of an answer, eos included, and how far behind the second likeliest was at each, in nats."""

    ids: list[int]
    margins: list[float]


def ask(client: Client, messages: Messages, max_tokens: int) -> Answer:
    """An answer as it is recorded. Raises DeviceError and OSError."""
    said = client.chat(messages, temperature=0, seed=0, max_tokens=max_tokens, logprobs=True, top_logprobs=2)
    margins = [_margin(token["top_logprobs"]) for token in said["tokens"]]
    return Answer([int(token["id"]) for token in said["tokens"]], margins)


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
    clear = sum(margin >= NEAR_TIE for answer in answers for margin in answer["margins"])
    asked = chosen = whole = 0
    for prompt, answer, said in zip(prompts, answers, own, strict=True):
        ids, alike = answer["ids"], _alike(answer["ids"], said)
        whole += alike == len(ids)
        for at, (token, margin) in enumerate(zip(ids, answer["margins"], strict=True)):
            if margin >= NEAR_TIE and _enough(asked, chosen, clear):
                asked += 1
                chosen += at < alike or client.next_id([*prompt, *ids[:at]]) == token
    shown = f"{chosen} of {asked} recorded tokens that were no near-ties, {LEAST_SHARE:.0%} needed"
    if asked < clear:
        shown += f" of {clear}: broken off"
    by = f"{made_by['library']} on {made_by['processor']}"
    return _enough(asked, chosen, clear), f"{shown}; {whole} of {len(answers)} answers whole; recorded by {by}"


def _enough(asked: int, chosen: int, clear: int) -> bool:
    """Whether it can still become enough."""
    return asked - chosen <= (1 - LEAST_SHARE) * clear


def _alike(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many are the same at the beginning of both."""
    shorter = min(len(ids), len(others))
    return next((at for at in range(shorter) if ids[at] != others[at]), shorter)
