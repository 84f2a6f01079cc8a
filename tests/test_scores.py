"""Scores against plain passes, figures recomputed one pair at a time, intervals and differences."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from orpo_cli.data.batches import nll_positions
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.recipe import LossSection
from orpo_cli.scores import (
    Scores,
    delta,
    evaluation_row,
    mean_figures,
    pair_lines,
    score_pairs,
    slices,
    summarise,
)
from tests.tiny import random_pairs, tiny_model

MEANS = ["loss", "nll_loss", "or_loss", "log_odds_ratio", "accuracy", "chosen_logps", "rejected_logps"]


def random_scores(count: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 40, count).astype(float)
    return Scores(
        -rng.exponential(1.0, count), -rng.exponential(1.2, count), rng.exponential(1.0, count) * tokens, tokens
    )


def log_odds(logp: float) -> float:
    return logp - math.log(-math.expm1(logp))


def naive_figures(scores: Scores, loss: LossSection) -> dict[str, float]:
    """Each mean, one pair after the other."""
    count = len(scores.nll)
    ratios = [log_odds(w) - log_odds(l) for w, l in zip(scores.chosen_logps, scores.rejected_logps, strict=True)]  # noqa: E741
    if loss.nll_reduction == "pair":
        nll = sum(n / t for n, t in zip(scores.nll, scores.nll_tokens, strict=True)) / count
    else:
        nll = sum(scores.nll) / sum(scores.nll_tokens)
    or_loss = sum(math.log1p(math.exp(-ratio)) for ratio in ratios) / count
    return {
        "loss": nll + loss.beta * or_loss,
        "nll_loss": nll,
        "or_loss": or_loss,
        "log_odds_ratio": sum(ratios) / count,
        "accuracy": sum(ratio > 0 for ratio in ratios) / count,
        "chosen_logps": sum(scores.chosen_logps) / count,
        "rejected_logps": sum(scores.rejected_logps) / count,
    }


@pytest.mark.parametrize("all_right", [False, True])
def test_pairs_that_are_all_alike_are_not_taken_for_certain(all_right):
    ratios = np.full(30, 1.0 if all_right else -1.0)
    columns = {"accuracy": (ratios > 0).astype(float), "log_odds_ratio": ratios}
    low, high = mean_figures(columns)["accuracy_ci95"]
    # Wilson's ends at a share of 0 of n are 0 and z^2 / (n + z^2).
    expected = 1.959963984540054**2 / (30 + 1.959963984540054**2)
    assert (low, high) == pytest.approx((1 - expected, 1.0) if all_right else (0.0, expected))


@pytest.mark.parametrize("reduction", ["pair", "token"])
def test_the_means_are_those_of_the_pairs(reduction):
    scores, loss = random_scores(30), LossSection(beta=0.3, nll_reduction=reduction)
    expected = naive_figures(scores, loss)
    figures = summarise(scores, random_pairs(30), loss)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-12)
        low, high = figures[f"{name}_ci95"]
        assert low < figures[name] < high
    assert figures["pairs"] == 30
    for side in ("chosen", "rejected"):
        assert figures[f"{side}_perplexity"] == pytest.approx(math.exp(-expected[f"{side}_logps"]))
        low, high = figures[f"{side}_logps_ci95"]
        assert figures[f"{side}_perplexity_ci95"] == pytest.approx([math.exp(-high), math.exp(-low)])

    row = evaluation_row(scores, loss, step=7, epoch=0.5)
    assert {name: row[f"eval_{name}"] for name in MEANS} == pytest.approx(expected)
    assert row["eval_perplexity"] == pytest.approx(figures["chosen_perplexity"])
    assert (row["step"], row["epoch"], row["eval_pairs"]) == (7, 0.5, 30)


def test_the_figures_are_the_same_every_time():
    scores, pairs = random_scores(20), random_pairs(20)
    assert summarise(scores, pairs, LossSection()) == summarise(scores, pairs, LossSection())


def test_certainty_and_impossibility_have_finite_figures():
    scores = Scores(np.array([0.0, -1e-9, -300.0]), np.array([-300.0, 0.0, -1e-9]), np.zeros(3), np.ones(3))
    figures = summarise(scores, random_pairs(3), LossSection())
    assert all(np.isfinite(value).all() for value in leaves(figures))


def leaves(figures: Any) -> list[Any]:
    """All numbers of nested figures; of groups without a pair, their count."""
    if isinstance(figures, dict):
        return [leaf for value in figures.values() if value is not None for leaf in leaves(value)]
    return [figures]


def test_a_single_pair_has_figures():
    figures = summarise(random_scores(1), random_pairs(1), LossSection())
    low, high = figures["accuracy_ci95"]
    assert high - low == pytest.approx(1.96**2 / (1 + 1.96**2), rel=1e-4)  # Wilson's: one pair says next to nothing
    assert 0 < figures["length_controlled_accuracy"] < 1


# Scores


def reference_logps(model, ids: np.ndarray) -> torch.Tensor:
    """log P of each token but the first, by one plain pass in float64."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    logits = model(input_ids=tokens).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("nll_tokens", ["response", "all"])
@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
def test_scores_are_those_of_plain_passes_in_the_order_of_the_pairs(nll_tokens, max_tokens):
    model, pairs = tiny_model("llama"), random_pairs(9, seed=4)
    scores = score_pairs(
        PairLogprobs(tiny_model("llama"), shares_prefix=True),
        pairs,
        nll_tokens=nll_tokens,
        max_tokens=max_tokens,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        for i, pair in enumerate(pairs):
            chosen, rejected = (reference_logps(model, ids) for ids in (pair.chosen_ids, pair.rejected_ids))
            positions = nll_positions(pair, nll_tokens)
            assert scores.chosen_logps[i] == pytest.approx(chosen[pair.chosen_start - 1 :].mean().item(), abs=2e-5)
            assert scores.rejected_logps[i] == pytest.approx(
                rejected[pair.rejected_start - 1 :].mean().item(), abs=2e-5
            )
            assert scores.nll[i] == pytest.approx(-chosen[positions - 1].sum().item(), abs=1e-3)
            assert scores.nll_tokens[i] == len(positions)


@pytest.mark.parametrize("shares_prefix", [True, False])
def test_scores_outlive_a_lack_of_memory_down_to_the_longest_pair(monkeypatch, shares_prefix):
    pairs, tried = random_pairs(9, seed=4), []
    logprobs = PairLogprobs(tiny_model("llama"), shares_prefix=shares_prefix)
    forward, room = PairLogprobs.forward, max(logprobs.tokens(pair) for pair in pairs)

    def limited(self, batch):
        tried.append(self.tokens(*batch.pairs))
        if tried[-1] > room:
            raise MemoryError
        return forward(self, batch)

    def score(**keywords):
        return score_pairs(logprobs, pairs, nll_tokens="response", device=torch.device("cpu"), **keywords)

    expected = score(max_tokens=4096)
    monkeypatch.setattr(PairLogprobs, "forward", limited)
    scores = score(max_tokens=4096, may_shrink=True)
    for found, wanted in zip(dataclasses.astuple(scores), dataclasses.astuple(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    failed = [size for size in tried if size > room]
    assert failed == sorted(failed, reverse=True)
    assert all(later <= earlier // 2 or later <= room for earlier, later in pairwise(failed))

    with pytest.raises(MemoryError):  # what the user has set is not changed
        score(max_tokens=4096)
    room, tried[:] = room - 1, []
    with pytest.raises(MemoryError):
        score(max_tokens=4096, may_shrink=True)
    assert tried[-1] == room + 1  # a pair by itself, tried once
    assert tried.count(room + 1) == 1


def test_pair_lines():
    pairs, scores = random_pairs(4, seed=5), random_scores(4)
    lines = list(pair_lines(scores, pairs))
    assert [line["index"] for line in lines] == [pair.index for pair in pairs]
    for i, (line, pair) in enumerate(zip(lines, pairs, strict=True)):
        assert line["chosen_logps"] == scores.chosen_logps[i]
        assert line["rejected_logps"] == scores.rejected_logps[i]
        expected = log_odds(scores.chosen_logps[i]) - log_odds(scores.rejected_logps[i])
        assert line["log_odds_ratio"] == pytest.approx(expected)
        assert line["chosen_tokens"] == len(pair.chosen_ids[pair.chosen_start :])
        assert line["rejected_tokens"] == len(pair.rejected_ids[pair.rejected_start :])
        assert line["prompt_tokens"] == pair.chosen_start
    json.dumps(lines)


# Comparison


def test_a_model_beside_itself_differs_in_nothing():
    scores = random_scores(30)
    figures = delta(scores, scores, LossSection())
    assert figures["accuracy_p_mcnemar"] == figures["loss_p_sign_flip"] == 1.0
    assert {value for value in figures.values() if isinstance(value, float)} == {0.0, 1.0}


def test_a_model_gone_bad_has_a_difference_without_numbers():
    scores, bad = random_scores(5), random_scores(5)
    bad.chosen_logps[2] = math.nan
    figures = delta(bad, scores, LossSection())
    assert math.isnan(figures["loss"])
    assert math.isnan(figures["loss_p_sign_flip"])
    assert figures["rejected_logps_p_sign_flip"] == 1.0


def test_slices_are_the_figures_of_their_pairs_alone():
    scores, loss = random_scores(12), LossSection()
    figures = slices(scores, {"all": np.arange(12), "two": np.array([3, 7])}, loss)
    expected = summarise(scores, random_pairs(12), loss)
    for name in MEANS:
        assert figures["all"][name] == pytest.approx(expected[name])
        assert figures["two"][name] == pytest.approx(summarise(scores.at([3, 7]), random_pairs(2), loss)[name])
    assert figures["two"]["accuracy_ci95"][1] - figures["two"]["accuracy_ci95"][0] > 0.5
