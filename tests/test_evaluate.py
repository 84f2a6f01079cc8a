"""`orpo eval`: every figure recomputed from plain passes in float64, whatever it is pointed at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orpo_cli.errors import DataError, InputError
from orpo_cli.evaluate import Extras, evaluate_target, figure_names
from orpo_cli.recipe import LossSection
from tests.conftest import tiny_rows, write_tiny_base, write_tiny_recipe
from tests.test_scores import MEANS, log_odds


def without_ci(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if isinstance(value, float)}


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


@pytest.mark.parametrize("asked", [{}, {"base": True, "by": ("prompt",), "samples": 2}, {"answers": True}])
def test_the_names_of_the_figures_are_known_beforehand(tiny_run, tiny_base, tmp_path, asked):
    given = {"base": str(tiny_base), "answers": tmp_path / "answers.json"}
    extras = Extras(max_new_tokens=1, **{name: given.get(name, value) for name, value in asked.items()})
    assert figure_names(extras) == evaluate_target(str(tiny_run), extras=extras).keys()


def test_what_is_missing_is_said(tiny_base, tiny_recipe, tmp_path):
    with pytest.raises(InputError, match="nothing says which pairs to score"):
        evaluate_target(str(tiny_base))
    recipe = tiny_recipe(data={"eval": None})
    with pytest.raises(DataError, match="the recipe has no held-out data"):
        evaluate_target(str(tiny_base), recipe_file=recipe)


# Every figure, recomputed from the logits of plain padded passes in float64


@pytest.fixture(scope="module")
def other_base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("other-base")
    write_tiny_base(directory, seed=1)
    return directory


@pytest.fixture(scope="module")
def grouped_pairs(tmp_path_factory) -> Path:
    """40 pairs with a source, a nested judge and a score; the last has a prompt that stands there before."""
    path = tmp_path_factory.mktemp("grouped") / "pairs.jsonl"
    rows = [
        {**row, "source": "ab"[i % 3 == 0], "meta": {"judge": {"name": "x" if i < 10 else "y"}}, "score": i / 4}
        for i, row in enumerate(tiny_rows(40))
    ]
    rows[39]["prompt"] = rows[0]["prompt"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain_logps(model: Any, pairs: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """log P of every token but the first of both sides of each pair; one padded pass over all of them."""
    sequences = [pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs for side in ("chosen", "rejected")]
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    with torch.no_grad():
        logits = model.double().eval()(input_ids=ids, attention_mask=mask).logits
    logps = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    rows = [row[: len(sequence) - 1].tolist() for row, sequence in zip(logps, sequences, strict=True)]
    return [{"chosen": rows[i], "rejected": rows[i + 1]} for i in range(0, len(rows), 2)]


def columns_of(
    logps: list[dict[str, list[float]]], pairs: list[dict[str, Any]], loss: LossSection
) -> dict[str, list[float]]:
    """Each figure of each pair, one pair after the other."""
    columns: dict[str, list[float]] = {name: [] for name in MEANS}
    nll = []
    for logp, pair in zip(logps, pairs, strict=True):
        mean = {
            side: sum(logp[side][-len(pair[f"{side}_ids"]) :]) / len(pair[f"{side}_ids"])
            for side in ("chosen", "rejected")
        }
        ratio = log_odds(mean["chosen"]) - log_odds(mean["rejected"])
        counted = logp["chosen"] if loss.nll_tokens == "all" else logp["chosen"][-len(pair["chosen_ids"]) :]
        nll.append((-sum(counted), len(counted)))
        columns["or_loss"].append(math.log1p(math.exp(-ratio)))
        columns["log_odds_ratio"].append(ratio)
        columns["accuracy"].append(float(ratio > 0))
        columns["chosen_logps"].append(mean["chosen"])
        columns["rejected_logps"].append(mean["rejected"])
    mean_tokens = sum(tokens for _, tokens in nll) / len(nll)
    for total, tokens in nll:
        columns["nll_loss"].append(total / (tokens if loss.nll_reduction == "pair" else mean_tokens))
    columns["loss"] = [n + loss.beta * o for n, o in zip(columns["nll_loss"], columns["or_loss"], strict=True)]
    return columns


def students_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by adding up its density."""
    steps = 200_000
    x = (np.arange(steps) + 0.5) * (20 / steps)
    density = (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    reached = np.cumsum(density) * math.exp(log_scale) * (20 / steps)
    return float(x[np.searchsorted(reached, 0.475)])


def resamples(count: int) -> list[np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(0))
    return [generator.integers(0, count, count) for _ in range(2000)]


def ends(statistic: list[float], count: int) -> list[float]:
    """The expanded percentile interval."""
    tail = 0.5 * math.erfc(math.sqrt(count / (count - 1) / 2) * students_t(count - 1))
    ordered = sorted(statistic)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])

    return [at(tail), at(1 - tail)]


def length_controlled(correct: list[float], longer: list[float]) -> float:
    """The penalised fit by a general optimiser."""
    y, d = torch.tensor(correct).double(), torch.tensor(longer).double()
    d = d / d.std(correction=0)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        z = weights[0] + weights[1] * d
        value = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum")
        value = value + 0.005 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    return torch.sigmoid(weights[0]).item()


def check(figures: dict[str, Any], columns: dict[str, list[float]], pairs: list[dict[str, Any]]) -> None:
    """All that `summarise` says."""
    count = len(pairs)
    draws = resamples(count)
    assert figures["pairs"] == count
    for name, values in columns.items():
        column = np.array(values)
        means = [float(column[draw].mean()) for draw in draws]
        assert figures[name] == pytest.approx(column.mean(), rel=1e-4, abs=1e-5), name
        expected = ends(means, count)
        if name == "accuracy" and len(set(values)) == 1:  # Wilson's, of a share of 0 or 1
            certain = count / (count + 1.959963984540054**2)
            expected = [certain, 1.0] if values[0] else [0.0, 1 - certain]
        assert figures[f"{name}_ci95"] == pytest.approx(expected, rel=1e-3, abs=1e-4), name
        if name in ("chosen_logps", "rejected_logps"):
            side = name.removesuffix("_logps")
            assert figures[f"{side}_perplexity"] == pytest.approx(math.exp(-column.mean()), rel=1e-4)
            expected = ends([math.exp(-mean) for mean in means], count)
            assert figures[f"{side}_perplexity_ci95"] == pytest.approx(expected, rel=1e-3)
    longer = [float(len(pair["chosen_ids"]) - len(pair["rejected_ids"])) for pair in pairs]
    controlled = length_controlled(columns["accuracy"], longer)
    assert figures["length_controlled_accuracy"] == pytest.approx(controlled, abs=1e-5)
    low, high = figures["length_controlled_accuracy_ci95"]
    assert low < controlled < high
    for which, sign in (("shorter", -1), ("equal", 0), ("longer", 1)):
        of = [a for a, d in zip(columns["accuracy"], longer, strict=True) if np.sign(d) == sign]
        found = figures["accuracy_by_length"][f"chosen_{which}"]
        assert found["pairs"] == len(of)
        assert found["accuracy"] == (pytest.approx(sum(of) / len(of)) if of else None)
        if of:
            assert found["accuracy_ci95"][0] <= found["accuracy"] <= found["accuracy_ci95"][1]


@pytest.mark.parametrize("loss", [{}, {"beta": 0.7, "nll_tokens": "all", "nll_reduction": "token"}])
def test_every_figure_is_that_of_plain_passes_in_float64(
    tiny_run, tiny_base, other_base, grouped_pairs, tiny_pairs, tmp_path, orpo, loss
):
    recipe = write_tiny_recipe(
        tmp_path / "recipe.yaml",
        tiny_base,
        tiny_pairs,
        tmp_path / "x",
        loss=loss,
        data={"train": str(grouped_pairs), "eval": str(grouped_pairs)},
    )
    figures = evaluate_target(
        str(tiny_run),
        recipe_file=recipe,
        output=tmp_path / "eval.json",
        extras=Extras(base=str(other_base), by=("meta.judge.name", "score")),
    )
    section = LossSection(**loss)
    pairs = [json.loads(line) for line in orpo("data", recipe, "--json", "--held-out")[1].splitlines()]
    assert len(pairs) == 40
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tiny_run / "adapter")
    own = columns_of(plain_logps(model, pairs), pairs, section)
    base = columns_of(plain_logps(AutoModelForCausalLM.from_pretrained(other_base), pairs), pairs, section)
    check(figures, own, pairs)
    check(figures["base"], base, pairs)

    draws = resamples(40)
    assert figures["delta"]["pairs"] == 40
    for name in MEANS:
        difference = np.array(own[name]) - np.array(base[name])
        found = figures["delta"]
        assert found[name] == pytest.approx(difference.mean(), rel=1e-3, abs=2e-5), name
        expected = ends([float(difference[draw].mean()) for draw in draws], 40)
        assert found[f"{name}_ci95"] == pytest.approx(expected, rel=1e-3, abs=1e-4), name
        if name == "accuracy":
            better, worse = int((difference > 0).sum()), int((difference < 0).sum())
            tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1))
            assert found["accuracy_p_mcnemar"] == pytest.approx(min(1.0, 2 * tail / 2 ** (better + worse)))
        else:
            signs = np.random.default_rng(9).choice([-1.0, 1.0], (20_000, 40))
            share = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9)
            assert found[f"{name}_p_sign_flip"] == pytest.approx(share, abs=0.02)
    for side in ("chosen", "rejected"):
        column = [np.array(columns[f"{side}_logps"]) for columns in (own, base)]
        assert figures["delta"][f"{side}_perplexity"] == pytest.approx(
            math.exp(-column[0].mean()) - math.exp(-column[1].mean()), rel=1e-3
        )
        expected = ends([math.exp(-column[0][draw].mean()) - math.exp(-column[1][draw].mean()) for draw in draws], 40)
        assert figures["delta"][f"{side}_perplexity_ci95"] == pytest.approx(expected, rel=1e-3, abs=1e-2)

    assert list(figures["slices"]["meta.judge.name"]) == ["x", "y"]
    quarters = figures["slices"]["score"]
    assert [group["pairs"] for group in quarters.values()] == [10, 10, 10, 10]
    for group, where in (
        (figures["slices"]["meta.judge.name"]["y"], slice(10, 40)),
        (quarters["2.5 to 4.75"], slice(10, 20)),
    ):
        for name in set(MEANS) - ({"loss", "nll_loss"} if loss else set()):  # there a token weighs by all pairs' tokens
            assert group[name] == pytest.approx(np.mean(own[name][where]), rel=1e-4, abs=1e-5), name

    lines = [json.loads(line) for line in (tmp_path / "eval.pairs.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        for name in ("chosen_logps", "rejected_logps", "log_odds_ratio"):
            assert line[name] == pytest.approx(own[name][i], abs=1e-4)
            assert line[f"base_{name}"] == pytest.approx(base[name][i], abs=1e-4)


# Comparison


@pytest.mark.parametrize("part", ["", "merged", "adapter"])
def test_a_run_beside_its_base(tiny_run, tiny_base, part):
    """Read with the run's own tokens and template, the base is what the run's first evaluation saw."""
    figures = evaluate_target(str(tiny_run / part), extras=Extras(base=str(tiny_base)))
    first = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    for name in MEANS:
        assert figures["base"][name] == pytest.approx(first[f"eval_{name}"], abs=1e-5)
        assert figures["delta"][name] == pytest.approx(figures[name] - figures["base"][name], abs=1e-9)


def test_a_run_beside_another_run_and_itself(tiny_run, tiny_base):
    figures = evaluate_target(
        str(tiny_base), data=None, recipe_file=tiny_run / "recipe.yaml", extras=Extras(base=str(tiny_run))
    )
    own = json.loads((tiny_run / "eval.json").read_text())
    for name in MEANS:
        assert figures["base"][name] == pytest.approx(own[name], abs=1e-4)
    same = evaluate_target(str(tiny_run), extras=Extras(base=str(tiny_run)))
    assert same["delta"]["loss"] == 0.0


def test_a_base_with_other_tokens_is_scored_by_its_own(tiny_run, tmp_path):
    """A byte-pair merge that the run's tokenizer has not: the pairs are the same, their tokens are fewer."""
    from tokenizers import Tokenizer

    base = tmp_path / "base"
    write_tiny_base(base)
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["merges"] = [["e", "r"]]
    vocabulary["er"] = vocabulary.pop("ÿ")  # no text has this byte
    (base / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.from_file(str(base / "tokenizer.json")).encode("larger").ids) < 8
    figures = evaluate_target(str(tiny_run), output=tmp_path / "eval.json", extras=Extras(base=str(base)))
    assert figures["delta"]["pairs"] == figures["base"]["pairs"] == 8
    assert figures["base"]["loss"] != pytest.approx(json.loads((tiny_run / "eval.json").read_text())["loss"])
    assert "base_chosen_logps" in json.loads((tmp_path / "eval.pairs.jsonl").read_text().splitlines()[0])


def test_columns_that_group_nothing_are_refused(tiny_run, tmp_path):
    with pytest.raises(DataError, match="--by: the data has no column 'sauce'"):
        evaluate_target(str(tiny_run), extras=Extras(by=("sauce",)))
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(101)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="--by prompt: it has 101 different values"):
        evaluate_target(str(tiny_run), data=str(path), extras=Extras(by=("prompt",)))
