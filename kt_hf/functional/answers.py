"""How a predicted answer is held against the true ones: the definitions of SQuAD.

Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", section 6.1
(arXiv:1606.05250); no answer: Rajpurkar et al. 2018, "Know What You Don't Know", section 3 (arXiv:1806.03822).

One definition serves all languages: the articles left out are English ones, the punctuation is ASCII, and tokens are
what white space parts. So in languages without spaces an answer is one token, and F1 hardly differs from exact match.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """In lower case, without punctuation, without articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(guess: str, truth: str) -> float:
    """1 where both are the same once they are normalised."""
    return float(normalise(guess) == normalise(truth))


def f1(guess: str, truth: str) -> float:
    """2 common / (tokens of one + tokens of the other), each token as often as it occurs; where one has no tokens, 1 if
    neither has."""
    one, other = normalise(guess).split(), normalise(truth).split()
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other))


def best(score: Callable[[str, str], float], guess: str, truths: Sequence[str]) -> float:
    """The best score against any true answer. Without one (all that normalise to nothing are none), the right answer
    is to give none."""
    real = [truth for truth in truths if normalise(truth)] or [""]
    return max(score(guess, truth) for truth in real)
