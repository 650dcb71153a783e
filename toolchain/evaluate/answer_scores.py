"""Scores of one answer against another, and of one answer by itself: text and token counts in, numbers out.

Exact match and token F1 are SQuAD's (Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of
Text"): after lower case, and without punctuation and English articles. Words are what white space separates, so that
for scripts without spaces only exact match and similarity say something.
"""

import re
import string
from collections import Counter

LENGTH_WINDOW = 15
"""Tokens by which the length of an answer may differ from the teacher's."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """SQuAD's form of an answer: lower case, without ASCII punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same after `normalise`, else 0."""
    return float(normalise(answer) == normalise(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, in [0, 1]. If one side has no word: 1 where both have none."""
    said, wanted = normalise(answer).split(), normalise(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def length_within(tokens: int, reference_tokens: int, *, window: int = LENGTH_WINDOW) -> float:
    """1 where the lengths differ by at most `window` tokens, else 0."""
    return float(abs(tokens - reference_tokens) <= window)
