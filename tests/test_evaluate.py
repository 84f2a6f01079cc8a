"""The held-out figures: recomputed one pair at a time, and their intervals by simulation."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from orpo_cli.data.batches import nll_positions
from orpo_cli.errors import DataError, InputError
from orpo_cli.evaluate import (
    Scores,
    bootstrap,
    evaluate_target,
    evaluation_row,
    length_controlled_accuracy,
    pair_lines,
    score_pairs,
    summarise,
)
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.recipe import LossSection
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
    assert all(np.isfinite(value).all() for value in figures.values())


def test_a_single_pair_has_figures():
    figures = summarise(random_scores(1), random_pairs(1), LossSection())
    assert figures["accuracy_ci95"] == [figures["accuracy"]] * 2
    assert 0 < figures["length_controlled_accuracy"] < 1


# Intervals


def test_95_percent_intervals_hold_the_truth_in_about_95_percent():
    rng = np.random.default_rng(3)
    experiments = (1000, 60)
    for columns, truth in ((rng.normal(2.0, 3.0, experiments), 2.0), ((rng.random(experiments) < 0.7) * 1.0, 0.7)):
        means, low, high = bootstrap(columns)
        np.testing.assert_allclose(means, columns.mean(1))
        assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.95, abs=0.03)


def test_an_interval_is_as_wide_as_the_standard_error_says():
    column = np.random.default_rng(0).normal(size=(1, 1000))
    _, low, high = bootstrap(column)
    assert (high - low)[0] == pytest.approx(2 * 1.96 * column.std() / math.sqrt(1000), rel=0.1)


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
    assert length_controlled_accuracy(correct, longer) == pytest.approx(truth, abs=0.04)
    if length_effect:
        assert abs(correct.mean() - truth) > 0.05 or quality == 1.5


def test_a_judge_of_length_alone_is_no_better_than_chance():
    rng = np.random.default_rng(2)
    longer = rng.integers(1, 50, 500) * np.where(rng.random(500) < 0.8, 1.0, -1.0)
    assert (longer > 0).mean() > 0.75
    assert length_controlled_accuracy((longer > 0).astype(float), longer) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_answers_of_equal_length_have_their_plain_accuracy(share):
    correct = (np.arange(400) < share * 400).astype(float)
    assert length_controlled_accuracy(correct, np.zeros(400)) == pytest.approx(share, abs=0.01)
    assert length_controlled_accuracy(correct, np.full(400, 7.0)) == pytest.approx(share, abs=0.01)


def test_the_fit_is_where_the_penalised_likelihood_is_largest():
    correct, longer = simulated(1.0, 0.3, count=50)
    design = np.stack([np.ones(50), longer / longer.std()])

    def objective(a: float, b: float) -> float:
        z = a * design[0] + b * design[1]
        return float((correct * z - np.logaddexp(0, z)).sum() - 0.005 * (a * a + b * b))

    grid = np.linspace(-3, 3, 241)
    a, b = max(((a, b) for a in grid for b in grid), key=lambda ab: objective(*ab))
    fitted = length_controlled_accuracy(correct, longer)
    assert fitted == pytest.approx(1 / (1 + math.exp(-a)), abs=0.01)
    assert abs(b) < 3


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


# The verb


def without_ci(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if not name.endswith("_ci95")}


@pytest.mark.parametrize("part", ["", "adapter", "merged", "checkpoints/step-000004"])
def test_a_run_and_its_parts_score_as_its_own_evaluation_said(tiny_run, part):
    figures = evaluate_target(str(tiny_run / part))
    expected = json.loads((tiny_run / "eval.json").read_text())
    skipped = expected.pop("skipped")
    assert figures.pop("skipped") == skipped
    assert set(figures) == set(expected)
    for name, value in without_ci(expected).items():
        assert figures[name] == pytest.approx(value, abs=1e-4), name


def test_the_figures_are_those_of_the_last_evaluation(tiny_run):
    figures = json.loads((tiny_run / "eval.json").read_text())
    last = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in MEANS:
        assert last[f"eval_{name}"] == pytest.approx(figures[name], rel=1e-9)
    lines = [json.loads(line) for line in (tiny_run / "eval.pairs.jsonl").read_text().splitlines()]
    assert len(lines) == figures["pairs"] == 8
    assert np.mean([line["chosen_logps"] for line in lines]) == pytest.approx(figures["chosen_logps"])
    assert [line["index"] for line in lines] == sorted(line["index"] for line in lines)


def test_a_plain_model_on_pairs_of_its_own(tiny_base, tiny_pairs, tmp_path):
    output = tmp_path / "figures.json"
    figures = evaluate_target(str(tiny_base), data=str(tiny_pairs), output=output)
    assert json.loads(output.read_text()) == figures
    assert figures["pairs"] == 64
    assert figures["skipped"] == dict.fromkeys(
        ("diverged", "duplicate", "empty", "filtered", "identical", "malformed", "overlong"), 0
    )
    lines = [json.loads(line) for line in (tmp_path / "figures.pairs.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(64))
    assert np.mean([line["log_odds_ratio"] > 0 for line in lines]) == figures["accuracy"]


def test_a_run_on_other_pairs(tiny_run, tmp_path):
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no" if i else "yes"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = evaluate_target(str(tiny_run), data=str(path))
    assert figures["pairs"] == 2
    assert figures["skipped"]["identical"] == 1


def test_what_is_missing_is_said(tiny_base, tiny_recipe, tmp_path):
    with pytest.raises(InputError, match="nothing says which pairs to score"):
        evaluate_target(str(tiny_base))
    recipe = tiny_recipe(data={"eval": None})
    with pytest.raises(DataError, match="the recipe has no held-out data"):
        evaluate_target(str(tiny_base), recipe_file=recipe)
