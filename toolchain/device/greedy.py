"""Greedy answers to the golden prompts: recorded where the bundle is built, held against the server's where it runs.

Kernels for another processor round otherwise: of two tokens that are nearly as likely the other one may win, and from
there on the text is another. So each recorded token is asked for after the recorded ones before it, and those that
were near-ties when they were recorded do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .client import Client, Messages

SCHEMA_VERSION = 1
TOKENS = 32
"""Of each answer, at most."""
NEAR_TIE = 0.5
"""Nats between the two likeliest tokens, below which other kernels may well choose the other one: docs/device.md."""
LEAST_SHARE = 0.9
"""Of the tokens that were no near-ties."""
_FURTHEST = 20.0
"""What is further apart is not told apart: the server's own probabilities end near there."""


@dataclass(frozen=True)
class Answer:
    """The first tokens of an answer, eos included, and how far behind the second likeliest was at each, in nats."""

    ids: list[int]
    margins: list[float]


def ask(client: Client, messages: Messages, max_tokens: int) -> Answer:
    """An answer as it is recorded. Raises DeviceError and OSError."""
    said = client.chat(messages, temperature=0, seed=0, max_tokens=max_tokens, logprobs=True, top_logprobs=2)
    margins = [_margin(*(float(token["logprob"]) for token in tokens["top_logprobs"])) for tokens in said["tokens"]]
    return Answer(said["ids"], margins)


def _margin(first: float, second: float) -> float:
    return round(min(first - second, _FURTHEST), 2)


@dataclass
class Agreement:
    """Recorded tokens, of all answers together, and how many the server chooses as well."""

    whole: int = 0
    """Answers that are the same to their recorded end."""
    clear: int = 0
    clear_same: int = 0
    ties: int = 0
    ties_same: int = 0


def compare(client: Client, prompt_ids: Sequence[int], recorded: dict[str, Any], said: Sequence[int]) -> list[bool]:
    """Whether the server chooses each of the recorded tokens after those before it. Raises DeviceError and OSError.

    `said` are the tokens of its own answer: as far as they are the recorded ones, nothing is asked again.
    """
