"""Lexical diversity against its definitions, computed one n-gram at a time."""

from __future__ import annotations

import math
import random

import pytest

from orpo_cli.diversity import lexical_diversity, words


def naive_bleu(text: list[str], references: list[list[str]], order: int = 4) -> float:
    logs = []
    for n in range(1, order + 1):
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        if not grams:
            continue
        matched = 0
        for gram in set(grams):
            most = max(sum(tuple(other[i : i + n]) == gram for i in range(len(other) - n + 1)) for other in references)
            matched += min(grams.count(gram), most)
        logs.append(math.log((matched or 0.5) / len(grams)))
    if not logs:
        return 0.0
    closest = min((len(other) for other in references), key=lambda length: (abs(length - len(text)), length))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - closest / len(text)))


def test_words_and_marks():
    assert words("It's 12, isn't IT?") == ["it", "'", "s", "12", ",", "isn", "'", "t", "it", "?"]


@pytest.mark.parametrize("seed", range(4))
def test_diversity_is_that_of_the_definitions(seed):
    rng = random.Random(seed)
    texts = [[rng.choice(["a", "b", "c", "d", "e"]) for _ in range(rng.randint(0, 12))] for _ in range(9)]
    found = lexical_diversity([" ".join(text) for text in texts])
    for n in (1, 2, 3):
        grams = [" ".join(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
        assert found[f"distinct_{n}"] == len(set(grams)) / len(grams)
    bleus = [naive_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert found["self_bleu"] == pytest.approx(sum(bleus) / len(bleus))
    assert found["words"] == pytest.approx(sum(map(len, texts)) / len(texts))


def test_the_same_answer_to_everything_and_one_for_each():
    same = lexical_diversity(["I do not know that."] * 5)
    assert same["self_bleu"] == 1.0
    assert same["distinct_1"] == pytest.approx(6 / 30)
    different = lexical_diversity(["a b c d", "e f g h", "i j k l"])
    assert different["distinct_1"] == different["distinct_3"] == 1.0
    assert different["self_bleu"] < 0.3


def test_too_little_text_has_no_figures():
    assert lexical_diversity([""]) == {
        "words": 0.0,
        "distinct_1": None,
        "distinct_2": None,
        "distinct_3": None,
        "self_bleu": None,
    }
    assert lexical_diversity([])["words"] is None
    assert lexical_diversity(["", ""])["self_bleu"] == 0.0
