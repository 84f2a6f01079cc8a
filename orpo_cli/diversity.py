"""How much texts differ from one another in their words: what repeats itself from answer to answer scores low."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """The words and marks of a text, in lower case."""
    return _WORD.findall(text.lower())


def lexical_diversity(texts: Sequence[str]) -> dict[str, float | None]:
    """Mean words of a text, `distinct_1` to `distinct_3`, and `self_bleu`; None where there is too little text."""
    split = [words(text) for text in texts]
    return {
        "words": float(np.mean([len(text) for text in split])) if split else None,
        **{f"distinct_{n}": distinct(split, n) for n in (1, 2, 3)},
        "self_bleu": self_bleu(split),
    }


def distinct(texts: Sequence[Sequence[str]], n: int) -> float | None:
    """Different n-grams over all n-grams of texts in words (Li et al. 2016, arXiv 1510.03055); None where none is.

    It falls with the number of words, so that only sets of about the same length compare.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[Sequence[str]], order: int = 4) -> float | None:
    """Mean BLEU of each text in words with all others as references (Zhu et al. 2018, arXiv 1802.01886): 1 all alike.

    BLEU (Papineni et al. 2002) with the geometric mean of the precisions of 1- to `order`-grams and the brevity
    penalty; a precision of nothing counts as one half of an n-gram. None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    counts = [[Counter(_grams(text, n)) for n in range(1, order + 1)] for text in texts]
    # The largest number of times that any text has an n-gram, whose text that is, and the largest among the others.
    most: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for i, of_text in enumerate(counts):
        for grams in of_text:
            for gram, count in grams.items():
                first, owner, second = most.get(gram, (0, -1, 0))
                most[gram] = (count, i, first) if count > first else (first, owner, max(second, count))
    lengths = np.array([len(text) for text in texts])
    return float(np.mean([_bleu(i, of_text, most, lengths) for i, of_text in enumerate(counts)]))


def _bleu(
    own: int, counts: list[Counter[tuple[str, ...]]], most: dict[tuple[str, ...], tuple[int, int, int]], lengths: Any
) -> float:
    logs = []
    for grams in counts:
        if total := sum(grams.values()):
            matched = sum(
                min(count, most[gram][2] if most[gram][1] == own else most[gram][0]) for gram, count in grams.items()
            )
            logs.append(math.log(max(matched, 0.5) / total))
    if not logs:
        return 0.0
    others = np.delete(lengths, own)
    closest = others[np.lexsort((others, np.abs(others - lengths[own])))[0]]
    brevity = min(0.0, 1 - closest / lengths[own])
    return math.exp(brevity + sum(logs) / len(logs))


def _grams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
