"""Each figure against its definition, written out slowly."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from orpo_cli.data.formats import Message, Pair
from orpo_cli.data.statistics import (
    ALIKE,
    Finding,
    KeyFile,
    odd_unicode,
    percentiles,
    repeats_prompt,
    similarity,
)


def test_percentiles_are_the_least_values_that_so_many_do_not_exceed():
    draw = random.Random(0)
    for count in (1, 2, 3, 10, 99, 100, 101, 1000):
        values = [draw.randint(1, 300) for _ in range(count)]
        found = percentiles(Counter(values))
        for share in (50, 90, 95, 99):
            expected = min(v for v in values if sum(w <= v for w in values) >= share / 100 * count)
            assert found[f"p{share}"] == expected
        assert found["max"] == max(values)
        assert found["mean"] == pytest.approx(sum(values) / count)
    assert percentiles(Counter()) == {"mean": None, "p50": None, "p90": None, "p95": None, "p99": None, "max": None}


def naive_similarity(first: list[int], second: list[int]) -> float:
    pairs = [list(itertools.pairwise(ids)) for ids in (first, second)]
    left = list(pairs[1])
    common = 0
    for neighbours in pairs[0]:
        if neighbours in left:
            left.remove(neighbours)
            common += 1
    return 2 * common / (len(pairs[0]) + len(pairs[1]))


def test_similarity_is_the_share_of_neighbours_in_common():
    draw = random.Random(0)
    compared = 0
    for _ in range(300):
        first = [draw.randint(0, draw.choice([3, 200_000])) for _ in range(draw.randint(2, 60))]
        second = list(first)
        for _ in range(draw.randint(0, 3)):
            second[draw.randrange(len(second))] = draw.randint(0, 200_000)
        second += [1] * draw.choice([0, 0, 1, 20])
        found = similarity(np.array(first, np.int32), np.array(second, np.int32))
        expected = naive_similarity(first, second)
        assert found == pytest.approx(expected) or (found == 0 and expected < ALIKE)
        compared += expected >= ALIKE
    assert compared > 50
    assert similarity(np.array([1]), np.array([1])) == 0


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("plain ASCII\twith\nall its\r\nwhite space", set()),
        ("naïve café — “quoted”, São João, Ökologie, ÂME, 你好 👩\u200d🚀 می\u200cخواهم", set()),
        ("bell\x07", {"control characters"}),
        ("soft\u00adhyphen \ufeff", {"invisible characters"}),
        ("\u202eabc\u2066", {"direction marks"}),
        ("line\u2028end", {"line separators"}),
        ("\ue000", {"private use"}),
        ("what\ufffd", {"replacement characters"}),
        ("caf\u00c3\u00a9, it\u00e2\u20ac\u2122s", {"UTF-8 misread"}),
        ("next\u0085line \u200b", {"control characters", "invisible characters"}),
    ],
)
def test_odd_characters(text, kinds):
    assert odd_unicode(text) == kinds


def test_an_answer_repeats_its_prompt_or_last_turn():
    question = "Why is the sky so blue?"
    assert repeats_prompt(Pair(question, f" {question} It is.", "No.")) == ["chosen"]
    dialogue = (Message("user", "Hello there, assistant!"), Message("assistant", "Hi."), Message("user", question))
    assert repeats_prompt(Pair(dialogue, "No.", f"{question}\nYes.")) == ["rejected"]
    assert repeats_prompt(Pair(dialogue, "Hello there, assistant!", f"Well: {question}")) == []
    assert repeats_prompt(Pair("Hello", "Hello! How are you?", "Hello.")) == []


def test_a_finding_counts_all_and_keeps_the_first_examples_and_a_bounded_number_of_names():
    finding = Finding()
    for i in range(500):
        finding.add(lambda i=i: f"row {i}", lambda i=i: f"what {i}", {"often", f"once {i}"})
    summary = finding.summary()
    assert summary["pairs"] == 500
    assert summary["examples"] == [{"row": f"row {i}", "what": f"what {i}"} for i in range(3)]
    assert next(iter(summary["names"].items())) == ("often", 500)
    assert len(summary["names"]) == 100


def test_keys_count_as_brute_force_does_in_two_sets():
    draw = random.Random(0)
    keys = KeyFile()
    pairs: dict[bool, list[tuple[str, str, str]]] = {False: [], True: []}
    for position in range(9000):  # more than are written at once
        held_out = draw.random() < 0.2
        prompt, chosen, rejected = (str(draw.randint(0, 9999 if held_out else 4000)), *draw.sample("abc", 2))
        pairs[held_out].append((prompt, chosen, rejected))
        keys.add(held_out, position, Pair(prompt, chosen, rejected))
    for held_out, listed in pairs.items():
        found = keys.duplicates(held_out, str)
        assert found["pairs"] == len(listed) - len(set(listed)) > 0
        assert found["prompts"] == len(listed) - len({prompt for prompt, _, _ in listed})
        distinct = set(listed)
        assert found["swapped"] == sum((p, r, c) in distinct for p, c, r in listed) > 0
        assert len(found["examples"]) == len(found["swapped_examples"]) == 3
    trained = set(pairs[False])
    prompts = {prompt for prompt, _, _ in trained}
    overlap = keys.overlap(str, str)
    assert overlap["prompts"] == sum(prompt in prompts for prompt, _, _ in pairs[True])
    assert overlap["pairs"] == sum(pair in trained for pair in pairs[True]) > 0
    assert len(overlap["examples"]) == 3


def test_an_answer_cannot_pass_for_another_pairs_prompt():
    keys = KeyFile()
    for position, pair in enumerate(
        [Pair("a", "b", "cd"), Pair("a", "bc", "d"), Pair((Message("user", "a"),), "b", "cd")]
    ):
        keys.add(False, position, pair)
    found = keys.duplicates(False, str)
    assert (found["pairs"], found["prompts"], found["swapped"]) == (0, 1, 0)


_PEAK = """
import resource, sys
from orpo_cli.data.formats import Pair
from orpo_cli.data.statistics import KeyFile
keys = KeyFile()
for i in range(int(sys.argv[1])):
    keys.add(i % 10 == 0, i, Pair(f"question {i // 3}", "yes", "no"))
keys.duplicates(False, str)
keys.overlap(str, str)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_keys_take_no_more_memory_for_more_pairs():
    peaks = [
        int(subprocess.run([sys.executable, "-c", _PEAK, str(pairs)], check=True, capture_output=True).stdout)
        for pairs in (60_000, 180_000)
    ]
    assert peaks[1] < 1.05 * peaks[0]
