"""Intervals by simulation, tests of significance by enumeration, control of length by search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from orpo_cli.statistics import (
    bootstrap,
    groups,
    interval,
    length_controlled_accuracy,
    resampled_means,
    sign_flip_test,
    sign_test,
    wilson,
)

# Intervals: how often they hold the truth, over simulated samples

REPETITIONS = 1500
# Three standard errors of a share of 95 % in so many repetitions, and what a discrete share jumps by.
TOLERANCE = 3 * math.sqrt(0.95 * 0.05 / REPETITIONS)
DRAWS = {
    "accuracy 0.5": (lambda rng, shape: (rng.random(shape) < 0.5) * 1.0, 0.5),
    "accuracy 0.8": (lambda rng, shape: (rng.random(shape) < 0.8) * 1.0, 0.8),
    "normal": (lambda rng, shape: rng.normal(2.0, 3.0, shape), 2.0),
    "log-probs": (lambda rng, shape: -rng.gamma(4.0, 0.5, shape), -2.0),
}


@pytest.mark.parametrize("count", [50, 150, 500])
@pytest.mark.parametrize("name", DRAWS)
def test_95_percent_intervals_hold_the_truth_in_95_percent(name, count):
    draw, truth = DRAWS[name]
    columns = draw(np.random.default_rng(3), (REPETITIONS, count))
    means, low, high = bootstrap(columns)
    np.testing.assert_allclose(means, columns.mean(1))
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.95, abs=TOLERANCE + 0.5 / count)


@pytest.mark.parametrize("count", [50, 200])
def test_intervals_of_a_difference_of_perplexities_hold_the_truth(count):
    """Those of a statistic of two means: as perplexities are compared, model and base on the same pairs."""
    rng = np.random.default_rng(4)
    shared = rng.normal(0.0, 0.3, (REPETITIONS, count))
    own = -1.5 + shared + rng.normal(0.0, 0.2, (REPETITIONS, count))
    base = -2.0 + shared + rng.normal(0.0, 0.2, (REPETITIONS, count))
    low, high = interval(np.exp(-resampled_means(own)) - np.exp(-resampled_means(base)), count)
    truth = math.exp(1.5) - math.exp(2.0)
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.95, abs=TOLERANCE + 0.005)


@pytest.mark.parametrize("effect", [0.0, 1.0])
def test_intervals_of_the_length_controlled_accuracy_hold_the_truth(effect):
    rng, truth, held, count = np.random.default_rng(5), 0.7, 0, 200
    for _ in range(600):
        longer = np.round(rng.normal(5.0, 10.0, count))
        p = 1 / (1 + np.exp(-(math.log(truth / (1 - truth)) + effect * longer / longer.std())))
        value, low, high = length_controlled_accuracy((rng.random(count) < p) * 1.0, longer)
        assert low < value < high
        held += low <= truth <= high
    assert held / 600 == pytest.approx(0.95, abs=0.03)


def test_an_interval_is_as_wide_as_the_standard_error_says():
    column = np.random.default_rng(0).normal(size=(1, 1000))
    _, low, high = bootstrap(column)
    assert (high - low)[0] == pytest.approx(2 * 1.96 * column.std() / math.sqrt(1000), rel=0.1)


def test_a_few_pairs_have_wider_intervals_than_percentiles():
    column = np.random.default_rng(1).normal(size=(1, 5))
    low, high = np.percentile(resampled_means(column), [2.5, 97.5])
    wider = bootstrap(column)
    assert wider[1][0] < low < high < wider[2][0]


def test_the_interval_of_a_share_solves_its_equation():
    # Wilson's ends are the shares p from which the one seen is 1.96 standard errors, sqrt(p (1 - p) / n), away.
    for successes, trials in ((0, 10), (3, 10), (10, 10), (700, 1000)):
        for end in wilson(successes, trials):
            seen = successes / trials
            assert (seen - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / trials, rel=1e-4, abs=1e-12)


# Significance


def test_the_sign_test_is_the_sum_over_all_outcomes():
    for better, worse in itertools.product(range(9), repeat=2):
        count = better + worse
        outcomes = itertools.product((0, 1), repeat=count)
        as_uneven = sum(abs(2 * sum(outcome) - count) >= abs(better - worse) for outcome in outcomes)
        assert sign_test(better, worse) == pytest.approx(as_uneven / 2**count)
    assert sign_test(5000, 4000) < 1e-20
    assert sign_test(500_000, 500_000) == 1.0


def test_the_flips_come_near_all_flips():
    differences = np.random.default_rng(2).normal(0.4, 1.0, (3, 10))
    signs = np.array(list(itertools.product((-1, 1), repeat=10)))
    every = np.abs(signs @ differences.T)  # (1024, 3)
    exact = (every >= np.abs(differences.sum(1)) - 1e-9).mean(0)
    np.testing.assert_allclose(sign_flip_test(differences), exact, atol=0.02)
    assert sign_flip_test(np.ones((1, 40)))[0] == pytest.approx(1e-4)
    assert sign_flip_test(np.zeros((1, 40)))[0] == 1.0
    assert np.isnan(sign_flip_test(np.array([[1.0, np.nan]]))[0])


def test_where_nothing_differs_one_in_twenty_is_significant():
    p = sign_flip_test(np.random.default_rng(6).standard_t(4, (1000, 60)))
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.021)


# Length


def simulated(length_effect: float, quality: float, count: int = 4000):
    rng = np.random.default_rng(1)
    longer = np.round(rng.normal(5.0, 10.0, count))
    p = 1 / (1 + np.exp(-(quality + length_effect * longer / longer.std())))
    return (rng.random(count) < p).astype(float), longer


@pytest.mark.parametrize("quality", [-1.0, 0.0, 1.5])
@pytest.mark.parametrize("length_effect", [0.0, 2.0])
def test_length_controlled_accuracy_finds_the_accuracy_at_equal_length(quality, length_effect):
    correct, longer = simulated(length_effect, quality)
    truth = 1 / (1 + math.exp(-quality))
    assert length_controlled_accuracy(correct, longer)[0] == pytest.approx(truth, abs=0.04)
    if length_effect:
        assert abs(correct.mean() - truth) > 0.05 or quality == 1.5


def test_a_judge_of_length_alone_is_no_better_than_chance():
    rng = np.random.default_rng(2)
    longer = rng.integers(1, 50, 500) * np.where(rng.random(500) < 0.8, 1.0, -1.0)
    assert (longer > 0).mean() > 0.75
    value, low, high = length_controlled_accuracy((longer > 0).astype(float), longer)
    assert value == pytest.approx(0.5, abs=0.15)
    assert low < 0.5 < high


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("longer", [0.0, 7.0])
def test_answers_of_equal_length_have_their_plain_accuracy(share, longer):
    correct = (np.arange(400) < share * 400).astype(float)
    value, low, high = length_controlled_accuracy(correct, np.full(400, longer))
    assert value == pytest.approx(share, abs=0.01)
    assert 0 <= low < value < high <= 1
    assert high - low > 0.05


def test_the_fit_is_where_the_penalised_likelihood_is_largest():
    correct, longer = simulated(1.0, 0.3, count=50)
    design = np.stack([np.ones(50), longer / longer.std()])

    def objective(a: float, b: float) -> float:
        z = a * design[0] + b * design[1]
        return float((correct * z - np.logaddexp(0, z)).sum() - 0.005 * (a * a + b * b))

    grid = np.linspace(-3, 3, 241)
    a, b = max(((a, b) for a in grid for b in grid), key=lambda ab: objective(*ab))
    fitted, *_ = length_controlled_accuracy(correct, longer)
    assert fitted == pytest.approx(1 / (1 + math.exp(-a)), abs=0.01)
    assert abs(b) < 3


# Groups


def test_values_are_groups_numbers_by_size_then_texts_then_what_is_missing():
    values = ["b", 2, None, "a", 10, True, 2, "b", [1]]
    found = {name: places.tolist() for name, places in groups(values).items()}
    assert found == {"2": [1, 6], "10": [4], "true": [5], "[1]": [8], "a": [3], "b": [0, 7], "null": [2]}
    assert list(found)[:2] == ["2", "10"]
    assert list(found)[-1] == "null"


def test_many_numbers_are_cut_into_quarters():
    rng = np.random.default_rng(0)
    values = [None, *rng.permutation(np.arange(100)).tolist()]
    found = groups(values)
    assert list(found) == ["0 to 24", "25 to 49", "50 to 74", "75 to 99", "null"]
    assert sorted(values[place] for place in found["25 to 49"]) == list(range(25, 50))
    assert found["null"].tolist() == [0]


def test_quarters_of_many_ties_are_fewer():
    values = [0] * 80 + list(range(1, 21))
    found = groups(values)
    assert {name: len(places) for name, places in found.items()} == {"0 to 0": 80, "1 to 20": 20}
