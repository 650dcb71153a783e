"""Scores of answers, and the paired bootstrap."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.evaluate.answer_scores import exact_match, length_within, normalise, token_f1
from toolchain.evaluate.bootstrap import paired_differences

TEXT = st.text(max_size=60)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Quick, brown fox.", "quick brown fox"),
        ("A theatre; an apple", "theatre apple"),
        ("Run `ls -l`!\n", "run ls l"),
        ("the", ""),
        ("Größe 5", "größe 5"),
    ],
)
def test_answers_are_normalised_as_squad_does(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_exact_match_looks_past_case_punctuation_and_articles_only() -> None:
    assert exact_match("The cat.", "cat") == 1.0
    assert exact_match("The cats.", "cat") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("use the ls command", "Use ls.", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("red red blue", "red green", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("yes", "no", 0.0),
        ("", "no", 0.0),
        ("yes", "", 0.0),
        ("", "the", 1.0),
    ],
)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


@given(TEXT, TEXT)
def test_f1_is_symmetric_and_lies_between_exact_match_and_one(a: str, b: str) -> None:
    assert token_f1(a, b) == token_f1(b, a)
    assert exact_match(a, b) <= token_f1(a, b) <= 1.0
    assert token_f1(a, a) == 1.0


@pytest.mark.parametrize(("tokens", "score"), [(25, 1.0), (55, 1.0), (24, 0.0), (56, 0.0), (0, 0.0)])
def test_the_window_around_forty_tokens_is_fifteen_wide_on_both_sides(tokens: int, score: float) -> None:
    assert length_within(tokens, 40) == score


# --- bootstrap


def test_a_constant_difference_has_no_spread() -> None:
    (found,) = paired_differences([[0.1, 0.5, 0.9]], [[0.6, 1.0, 1.4]], resamples=100, seed=0)
    assert [found.mean, found.low, found.high] == pytest.approx([0.5, 0.5, 0.5])
    assert found.excludes_zero


def test_equal_scores_do_not_exclude_zero() -> None:
    (found,) = paired_differences([[0.0, 1.0, 0.3]], [[0.0, 1.0, 0.3]], resamples=100, seed=0)
    assert (found.mean, found.low, found.high, found.excludes_zero) == (0.0, 0.0, 0.0, False)


def test_pairing_sees_a_small_gain_that_differences_between_questions_would_hide() -> None:
    random = np.random.default_rng(1)
    hard = random.normal(0, 10, 200)
    gain = random.normal(0.5, 1, 200)
    (paired,) = paired_differences([hard.tolist()], [(hard + gain).tolist()], resamples=500, seed=0)
    (shuffled,) = paired_differences(
        [random.permutation(hard).tolist()], [(hard + gain).tolist()], resamples=500, seed=0
    )
    assert paired.excludes_zero
    assert paired.low > 0
    assert not shuffled.excludes_zero


def test_the_interval_is_that_of_the_normal_distribution_where_that_applies() -> None:
    after = np.random.default_rng(2).normal(1, 2, 400)
    (found,) = paired_differences([[0.0] * 400], [after.tolist()], resamples=4000, seed=0)
    half = 1.96 * after.std() / math.sqrt(400)
    assert found.mean == pytest.approx(after.mean())
    assert [found.low, found.high] == pytest.approx([after.mean() - half, after.mean() + half], abs=0.02)


def test_about_95_of_100_intervals_hold_the_true_difference() -> None:
    random = np.random.default_rng(3)
    after = random.normal(0.3, 1, (300, 60))
    found = paired_differences(np.zeros_like(after).tolist(), after.tolist(), resamples=400, seed=0)
    assert 0.90 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.98


def test_the_seed_alone_decides_and_scores_share_their_draws() -> None:
    before, after = [[0.0] * 9, [0.0] * 9], [[float(n * n) for n in range(9)]] * 2
    one = paired_differences(before, after, resamples=200, seed=5)
    assert one == paired_differences(before, after, resamples=200, seed=5)
    assert one[0] == one[1]
    assert one != paired_differences(before, after, resamples=200, seed=6)


@pytest.mark.parametrize(
    ("before", "after"), [([[]], [[]]), ([[1.0]], [[1.0, 2.0]]), ([1.0], [2.0]), ([[1.0, math.nan]], [[1.0, 1.0]])]
)
def test_scores_that_cannot_be_paired_are_refused(before: list[list[float]], after: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="score"):
        paired_differences(before, after, resamples=100, seed=0)
