"""Runs made to be ill, one for each finding, are told so; healthy ones, real and noisy, are not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from orpo_cli.metrics import read_metrics
from orpo_cli.recipe import load_recipe
from orpo_cli.train.health import LEAST, OF_EVALUATIONS, OF_TRAINING, Health, diagnose
from orpo_cli.train.run import train
from tests.conftest import write_tiny_base, write_tiny_recipe

# ---- real runs ----

LIKED = ("apple", "bread", "cedar", "delta", "eagle", "flute", "grape", "house", "igloo", "jelly")
OTHERS = ("kiosk", "lemon", "mango", "night", "olive", "piano", "queen", "river", "stone", "tulip")


def write_pairs(path: Path, count: int, seed: int, *, right: float = 1.0, form: bool = False) -> Path:
    """Answers that name a liked word are chosen, in a share `right` of the pairs; or those of a certain form."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = rng.sample(range(10, 99), 2)
        words = [rng.choice(LIKED), rng.choice(OTHERS)]
        if rng.random() >= right:
            words.reverse()
        answers = (
            [f"{max(a, b)} is larger.", f"No, {min(a, b)}!"] if form else [f"{word} {max(a, b)}." for word in words]
        )
        prompt = f"Which is larger, {a} or {b}?"
        rows.append(json.dumps({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def run_for(directory: Path, base: Path, pairs: Path, **changes) -> Path:
    """The directory of a run of 40 steps that holds out 40 pairs and scores them before and after."""
    changes["train"] = {"max_steps": 40, "learning_rate": 0.005, "save_steps": 1000} | changes.get("train", {})
    changes = {"data": {"eval": {"holdout": 40}}, "output": {"merge": False}} | changes
    train(load_recipe(write_tiny_recipe(directory / "recipe.yaml", base, pairs, directory / "run", **changes)))
    return directory / "run"


def health_of(run: Path) -> Health:
    recipe = load_recipe(run / "recipe.yaml")
    rows = read_metrics(run / "metrics.jsonl")
    return diagnose(rows, beta=recipe.loss.beta, total_steps=rows[-1]["step"])


@pytest.fixture(scope="module")
def fluent_run(tmp_path_factory):
    """All weights of a random base trained on the form of the answers, whose labels are at random."""
    directory = tmp_path_factory.mktemp("fluent")
    write_tiny_base(directory / "base", seed=0)
    pairs = write_pairs(directory / "pairs.jsonl", 600, 0, right=0.5)
    settings = {"max_steps": 120, "learning_rate": 0.01}
    return run_for(directory, directory / "base", pairs, lora=None, loss={"beta": 0.0}, train=settings)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A random base that happens to find the form of all chosen answers less likely than that of the others."""
    directory = tmp_path_factory.mktemp("strange")
    write_tiny_base(directory, seed=2)
    return directory


@pytest.fixture(scope="module")
def fluent(fluent_run):
    return fluent_run / "merged"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_healthy_run_raises_no_alarm(seed, fluent, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 400, seed)
    run = run_for(tmp_path, fluent, pairs, train={"max_steps": 50, "eval_steps": 20, "seed": seed})
    assert health_of(run).found == {}
    said = capsys.readouterr().err
    assert "warning" not in said
    assert "health: nothing amiss\n" in said


ILL = {
    ("both_collapse",): {"right": 0.5, "loss": {"beta": 50.0}, "train": {"learning_rate": 0.02}},
    ("odds_ratio_dominant",): {"loss": {"beta": 100.0}},
    ("loss_rises", "held_out_worsens"): {"train": {"learning_rate": 0.6, "warmup_steps": 59, "max_steps": 60}},
    ("odds_ratio_flat",): {"right": 0.5, "base": "strange"},
    ("odds_ratio_negligible",): {"right": 0.5, "loss": {"beta": 0.001}},
    ("overfits",): {
        "count": 16,
        "lora": None,
        "loss": {"beta": 0.5},
        "train": {"learning_rate": 0.01, "max_steps": 60},
        "data": {"eval": {"holdout": 8}},
    },
    ("lopsided_start", "answers_do_not_end"): {"form": True, "base": "strange", "train": {"learning_rate": 1e-6}},
}


@pytest.mark.parametrize("names", ILL)
def test_an_ill_run_is_told_what_it_has(names, fluent, strange, tmp_path, capsys):
    changes = dict(ILL[names])
    of_pairs = {key: changes.pop(key) for key in ("right", "form") if key in changes}
    pairs = write_pairs(tmp_path / "pairs.jsonl", changes.pop("count", 400), 1, **of_pairs)
    base = strange if changes.pop("base", "") == "strange" else fluent
    health = health_of(run_for(tmp_path, base, pairs, **changes))
    said = capsys.readouterr().err
    for name in names:
        assert name in health.found, health.found
        finding = health.found[name]
        assert f"warning: step {finding.step}: " in said  # while it ran
        assert f"health: {finding.what} ({finding.steps})\n  {finding.advice}\n" in said  # at the end
        assert any(figure.isdigit() for figure in finding.what)


def test_a_run_that_unlearns_everything_else_is_told_that_it_forgets(fluent_run):
    finding = health_of(fluent_run).found["forgets"]
    rows = [row for row in read_metrics(fluent_run / "metrics.jsonl") if "eval_loss" in row]
    perplexity = np.exp(-rows[-1]["eval_prompt_logps"])
    assert f"{np.exp(-rows[0]['eval_prompt_logps']):.3g} to the base and is {perplexity:.3g}" in finding.what


def test_every_rule_has_a_run_that_is_ill_with_it():
    elsewhere = {"unsteady", "forgets"}
    assert {rule.__name__ for rule in (*OF_TRAINING, *OF_EVALUATIONS)} == elsewhere.union(*ILL)


# ---- rows ----

STEPS = 600


def rows_of(loss, step: int = 1, **columns):
    """Training rows, one a step, healthy but for the columns that are given."""
    count = len(loss)
    default = {
        "nll_loss": np.asarray(loss) - 0.05,
        "log_odds_ratio": np.linspace(0, 1, count),
        "accuracy": np.linspace(0.5, 0.8, count),
        "chosen_logps": np.linspace(-1.5, -1.2, count),
        "rejected_logps": np.linspace(-1.5, -1.8, count),
        "or_gradient": np.full(count, 1.1),
    }
    columns = {"loss": loss} | default | columns
    return [{"step": step + i} | {key: float(values[i]) for key, values in columns.items()} for i in range(count)]


def noisy_run(seed: int) -> list[dict]:
    """A run that learns, in batches of eight: its accuracy in eighths, its losses skewed, its labels half noise."""
    draw = np.random.default_rng(seed)
    learnt = 1 - np.exp(-np.arange(STEPS) / 100)
    scatter = draw.normal(size=(3, STEPS)) * 0.25
    chosen, rejected = -1.6 + 0.4 * learnt + scatter[0], -1.6 + 0.1 * learnt + scatter[1]
    nll = np.maximum(-chosen, 0.05) * draw.lognormal(0, 0.2, STEPS)
    return rows_of(
        nll + 0.06,
        nll_loss=nll,
        chosen_logps=chosen,
        rejected_logps=rejected,
        log_odds_ratio=0.6 * learnt + scatter[2],
        accuracy=draw.binomial(8, 0.5 + 0.2 * learnt) / 8,
        or_gradient=draw.lognormal(0, 0.2, STEPS),
    )


def test_noise_alone_is_no_illness():
    ill = [seed for seed in range(40) if diagnose(noisy_run(seed), beta=0.1, total_steps=STEPS).found]
    assert ill == []


@pytest.mark.parametrize("seed", range(5))
def test_a_run_at_a_standstill_is_no_illness(seed):
    draw = np.random.default_rng(seed)
    rows = rows_of(draw.lognormal(0.3, 0.4, STEPS))
    for row in rows:
        row |= {"chosen_logps": -row["nll_loss"], "rejected_logps": -row["nll_loss"], "log_odds_ratio": 0.0}
    assert not {"loss_rises", "both_collapse"} & diagnose(rows, beta=0.1, total_steps=STEPS).found.keys()


def test_few_rows_are_not_judged_and_that_is_said():
    rows = rows_of(np.geomspace(1, 50, LEAST - 1))
    health = diagnose(rows, beta=0.1, total_steps=1000)
    assert health.found == {}
    assert f"fewer than {LEAST}" in health.nothing_found
    assert "fewer" not in diagnose(noisy_run(0), beta=0.1, total_steps=STEPS).nothing_found


def test_a_finding_keeps_its_first_step_and_the_newest_numbers():
    health = Health(beta=0.1, total_steps=200)
    new = [health.see(row) for row in rows_of(np.concatenate([np.full(60, 1.0), np.linspace(1, 3, 140)]))]
    [finding] = [finding for findings in new for finding in findings]
    [at_end] = health.findings()
    assert finding.name == at_end.name == "loss_rises"
    assert finding.step == finding.until == at_end.step < at_end.until == 200
    assert finding.what != at_end.what


@pytest.mark.parametrize("kind", ["spike", "skipped"])
def test_several_odd_steps_within_a_short_time_are_unsteady(kind):
    def found(*steps: int) -> bool:
        rows = rows_of(np.full(STEPS, 1.0))
        for step in steps:
            rows[step - 1] |= {kind: True, **({"loss": None} if kind == "skipped" else {})}
        return "unsteady" in diagnose(rows, beta=0.1, total_steps=STEPS).found

    assert found(300, 350, 400)
    assert not found(300, 350)
    assert not found(50, 300, 550)
    if kind == "skipped":  # as float16 begins, to find its loss scale
        assert not found(1, 2, 3, 4)


def evaluation(step: int, **figures) -> dict:
    usual = {"loss": 1.0, "accuracy": 0.6, "pairs": 100, "chosen_logps": -1.0, "end_logps": -0.1, "prompt_logps": -2.0}
    return {"step": step} | {f"eval_{key}": value for key, value in (usual | figures).items()}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("held_out_worsens", [{"loss": 1.2}, {"loss": 1.0}, {"loss": 1.06}, {"loss": 1.07}]),
        ("held_out_worsens", [{"loss": 1.0}, {"loss": 0.9}, {"loss": 0.9}, {"loss": 0.96}, {}]),  # the last at the end
        ("answers_do_not_end", [{"end_logps": -9.0}, {"end_logps": -5.0}, {"end_logps": -4.0}]),
        ("forgets", [{}, {"prompt_logps": -2.8}]),
        ("forgets", [{"prompt_logps": -2.8, "base_prompt_logps": -2.0}]),
        ("lopsided_start", [{"accuracy": 0.85}]),
        ("lopsided_start", [{"accuracy": 0.15}]),
    ],
)
def test_an_ill_course_of_evaluations_is_told(name, rows):
    found = diagnose(
        [evaluation(100 * i, **figures) for i, figures in enumerate(rows)], beta=0.1, total_steps=400
    ).found
    assert list(found) == [name]


@pytest.mark.parametrize(
    "rows",
    [
        [{"loss": 1.2}, {"loss": 1.0}, {"loss": 1.06}, {"loss": 1.04}],  # up and down
        [{"loss": 1.2}, {"loss": 1.0}, {"loss": 1.06}],  # once, and not at the end
        [{"end_logps": -9.0}, {"end_logps": -4.0}],  # not half way yet
        [{"prompt_logps": -2.0}, {"prompt_logps": -2.6}, {"prompt_logps": -1.0}],
        [{"accuracy": 0.85, "pairs": 20}],
        [{"accuracy": 0.6}, {"accuracy": 1.0}],
        [{"loss": None, "accuracy": None, "end_logps": None, "prompt_logps": None, "chosen_logps": None}] * 3,
    ],
)
def test_a_healthy_course_of_evaluations_is_not(rows):
    rows = [evaluation(100 * i, **figures) for i, figures in enumerate(rows)]
    assert diagnose(rows, beta=0.1, total_steps=400).found == {}


def test_rows_without_newer_columns_are_read():
    rows = [{k: v for k, v in row.items() if k != "or_gradient"} for row in noisy_run(0)]
    assert diagnose(rows, beta=0.1, total_steps=STEPS).found == {}


def test_learning_by_heart_is_told_by_what_is_held_out():
    count = 60
    learnt = {"chosen_logps": np.geomspace(-1, -0.001, count), "rejected_logps": np.linspace(-1, -8, count)}
    rows = rows_of(np.linspace(1, 0.1, count), **learnt)

    def found(*evaluations):
        return diagnose([*evaluations, *rows], beta=0.1, total_steps=count).found

    assert list(found()) == ["overfits"]
    assert "held-out chosen ones have -1" in found(evaluation(0, chosen_logps=-1.0))["overfits"].what
    assert found(evaluation(0, chosen_logps=-0.05)) == {}
