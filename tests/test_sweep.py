"""A grid of runs: how it is written, which run is the best by the rule, and that neither failures nor kills end it."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml

from orpo_cli import cli, sweep
from orpo_cli.data.templates import BUILT_IN
from orpo_cli.errors import InputError, RecipeError, Stopped
from orpo_cli.recipe import load_recipe
from orpo_cli.run_directory import RunDirectory
from orpo_cli.sweep import Judging, choose, grid, run_name, split_values
from tests.runs import same_files
from tests.shared import shared

FEW = ("--samples", "2", "--max-new-tokens", "4")


@pytest.fixture
def at_once(monkeypatch):
    """The verbs of a sweep, called within this process: the same work without four seconds of imports each."""

    def call(*arguments: str, read: bool = False) -> tuple[int, str, str]:
        out, said = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setattr(sys, "argv", ["orpo", *arguments])
            return cli._exit_code(), out.getvalue(), said.getvalue()

    monkeypatch.setattr(sweep, "_orpo", call)


# ---- the grid ----


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1", ["0.1"]),
        ("0.01, 0.1,0.5", ["0.01", "0.1", "0.5"]),
        ("{holdout: 0.02}", ["{holdout: 0.02}"]),
        ("[q_proj, v_proj],all-linear", ["[q_proj, v_proj]", "all-linear"]),
        ("[[a, b], {c: [d, e]}],null", ["[[a, b], {c: [d, e]}]", "null"]),
        ("'a, b','it''s, so',c", ["'a, b'", "'it''s, so'", "c"]),
        (r'"a \", b",c', [r'"a \", b"', "c"]),
        ("[']', ','],x", ["[']', ',']", "x"]),
        ("it's,that's", ["it's", "that's"]),  # a quote within a word opens nothing
        ("0.1,", ["0.1", ""]),
        ("", [""]),
    ],
)
def test_commas_part_values_but_not_what_is_bracketed_or_quoted(text, values):
    assert split_values(text) == values


def test_a_grid_is_every_combination_with_what_is_set_once_in_all(tiny_recipe):
    points = grid(tiny_recipe(), ["loss.beta=0,0.5", "train.seed=7", "lora.target_modules=all-linear,[q_proj, v_proj]"])
    assert [(p.recipe.loss.beta, p.recipe.lora.target_modules, p.recipe.train.seed) for p in points] == [
        (0.0, "all-linear", 7),
        (0.0, ["q_proj", "v_proj"], 7),
        (0.5, "all-linear", 7),
        (0.5, ["q_proj", "v_proj"], 7),
    ]
    assert points[0].values == {"loss.beta": 0, "lora.target_modules": "all-linear"}
    assert points[0].name == "beta-0_target_modules-all-linear"
    assert len({point.name for point in points}) == 4


def test_names_are_those_of_files_and_different_for_different_values():
    values = ["a/b", "a b", "../../a", "a", "", ".", "x" * 300, "x" * 301, "é", "a\nb", 0.1, 1, None, True, [1, 2]]
    names = [run_name({"data.train": value}) for value in values]
    assert len(set(names)) == len(values)
    for name in names:
        assert len(name.encode()) <= 100
        assert Path(name).name == name
        assert name.startswith("train")
        assert name.isascii()
        assert name.isprintable()
        assert " " not in name
    assert run_name({"loss.beta": 0.1, "lora.r": 16}) == "beta-0.1_r-16"
    assert run_name({"lora.alpha": 1, "other.alpha": 2}) == "lora.alpha-1_other.alpha-2"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ([], InputError, "nothing varies"),
        (["loss.beta=0.1"], InputError, "nothing varies"),
        (["loss.beta=0.1,0.10"], InputError, "beta-0.1 is in the grid twice"),
        (["loss.beta=0.1,"], InputError, "no value beside one of the commas"),
        (["loss.beta=0.1,0.2", "loss.beta=0.3"], InputError, "given twice"),
        (["output.dir=a,b"], InputError, "changes no result"),
        (["train.seed=" + ",".join(map(str, range(1001)))], InputError, "1,001 runs"),
        (["loss.beta=0.1,0.2", "data.eval=null"], InputError, "no held-out pairs"),
        (["loss.beta=0.1,-1"], RecipeError, "loss.beta"),
        (["loss.bta=0.1,0.2"], RecipeError, "loss.bta"),
        (["loss.beta=0.1,0.2", "train.seed"], RecipeError, "not of the form"),
    ],
)
def test_what_is_no_grid_is_refused_before_anything_runs(tiny_recipe, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        sweep.sweep(tiny_recipe(), settings)
    assert not (tmp_path / "run").exists()


def test_directories_that_hold_something_are_refused(tiny_recipe, tmp_path, orpo):
    settings = ["--set", "loss.beta=0.1,0.2"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/sweep.json").write_text("{}")
    code, _, said = orpo("sweep", tiny_recipe(), *settings)
    assert (code, "already holds a sweep" in said, "hint: --resume" in said) == (2, True, True)
    (tmp_path / "run/manifest.json").write_text("{}")
    code, _, said = orpo("sweep", tiny_recipe(), *settings, "--resume")
    assert (code, "already holds a run" in said) == (2, True)


# ---- the choice ----


def judged(accuracy: float, perplexity: float, ended: float, count: int = 400) -> tuple[dict, dict]:
    """A run with these figures: of its pairs the first ones are right, so that runs differ in as few as they can."""
    right = (np.arange(count) < accuracy * count).astype(float)
    figures = {"accuracy": accuracy, "log_odds_ratio": accuracy, "chosen_perplexity": perplexity, "ended": ended}
    logps = -np.log(perplexity) + 0.01 * np.sin(np.arange(count))
    return figures, {"accuracy": right, "log_odds_ratio": right, "chosen_perplexity": logps}


def chosen(runs: dict[str, tuple[dict, dict]], **judging) -> tuple[dict[str, str], str | None]:
    of_figures, columns = ({name: run[i] for name, run in runs.items()} for i in (0, 1))
    return choose(of_figures, columns, Judging(**judging))


def test_the_highest_accuracy_wins_where_nothing_speaks_against_it():
    runs = {"low": judged(0.70, 8.0, 1.0), "high": judged(0.80, 8.5, 1.0), "middle": judged(0.75, 8.2, 0.95)}
    assert chosen(runs) == ({"low": "lower", "middle": "lower", "high": "best"}, "high")


def test_a_collapsed_run_loses_however_accurate():
    runs = {"sound": judged(0.70, 8.0, 0.9), "rambles": judged(0.9, 8.0, 0.7), "collapsed": judged(0.95, 30.0, 0.9)}
    assert chosen(runs) == ({"sound": "best", "rambles": "answers", "collapsed": "perplexity"}, "sound")
    assert chosen(runs, tolerance=10.0)[1] == "collapsed"


def test_what_is_within_chance_goes_to_the_lower_perplexity():
    # Two of 400 pairs decided otherwise are chance (p = 0.5); forty are not.
    runs = {"plain": judged(0.795, 8.0, 1.0), "top": judged(0.80, 8.5, 1.0), "worse": judged(0.70, 7.9, 1.0)}
    assert chosen(runs) == ({"plain": "best", "top": "tied", "worse": "lower"}, "plain")


def test_the_run_with_the_lowest_perplexity_need_not_be_one_whose_answers_end():
    runs = {"endless": judged(0.7, 4.0, 0.0), "ends": judged(0.7, 8.0, 1.0)}
    assert chosen(runs) == ({"endless": "answers", "ends": "best"}, "ends")


def test_runs_without_figures_are_out():
    gone = {**judged(0.9, 5.0, 1.0)[0], "chosen_perplexity": None}, judged(0.9, 5.0, 1.0)[1]
    assert chosen({"gone": gone, "there": judged(0.6, 8.0, 0.5)}) == ({"gone": "no figures", "there": "best"}, "there")
    assert chosen({"gone": gone}) == ({"gone": "no figures"}, None)
    assert chosen({}) == ({}, None)


def test_another_metric_decides_otherwise():
    runs = {"low": judged(0.70, 8.0, 1.0), "high": judged(0.80, 8.5, 1.0)}
    assert chosen(runs, metric="chosen_perplexity")[1] == "low"
    assert chosen(runs, metric="log_odds_ratio")[1] == "high"


# ---- the runs ----


def test_a_sweep_from_recipe_to_table(tiny_recipe, tmp_path, orpo, at_once):
    recipe = tiny_recipe()
    code, out, said = orpo("sweep", recipe, "--set", "loss.beta=0,0.5", "--set", "train.seed=3", *FEW)
    assert code == 0, said
    summary = json.loads(out)
    assert out == (tmp_path / "run/sweep.json").read_text()
    assert [(run["run"], run["set"], run["state"]) for run in summary["runs"]] == [
        ("beta-0", {"loss.beta": 0}, "finished"),
        ("beta-0.5", {"loss.beta": 0.5}, "finished"),
    ]
    for run in summary["runs"]:
        figures = json.loads((tmp_path / "run" / run["run"] / "eval.json").read_text())
        for name in ("accuracy", "chosen_perplexity", "log_odds_ratio"):
            assert (run[name], run[f"{name}_ci95"]) == (figures[name], figures[f"{name}_ci95"])
        assert run["prompts"] == 2
        assert 0 <= run["ended_ci95"][0] <= run["ended"] <= run["ended_ci95"][1] <= 1
        assert not (tmp_path / "run" / run["run"] / "merged").exists()
    assert summary["same_data_order"] is True
    best, lowest = summary["best"], min(summary["runs"], key=lambda run: run["chosen_perplexity"])
    assert best["perplexity_cost"] == pytest.approx(best["chosen_perplexity"] / lowest["chosen_perplexity"] - 1)
    low, high = best["perplexity_cost_ci95"]
    assert low <= best["perplexity_cost"] <= high
    assert f"best: {best['run']}, accuracy " in said
    html = (tmp_path / "run/sweep.html").read_text()
    for told in (
        "Chosen by accuracy",
        "answers end",
        *(run["run"] for run in summary["runs"]),
        f"{best['accuracy']:.1%}",
    ):
        assert told in html
    assert f"best: {best['run']}, accuracy " in html
    assert 'id="curves"' in html

    # The winner's recipe is a whole one: training by it makes the run anew, and merges.
    code, _, said = orpo("train", tmp_path / "run/best.yaml")
    assert code == 0, said
    won = RunDirectory(tmp_path / "run" / best["run"])
    again = RunDirectory(tmp_path / "run/best")
    assert again.eval.read_bytes() == won.eval.read_bytes()
    assert again.merged.is_dir()

    # Nothing is made twice; values may be added.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("beta-*/*")}
    code, out, said = orpo("sweep", recipe, "--set", "loss.beta=0,0.5,1", "--set", "train.seed=3", *FEW, "--resume")
    assert code == 0, said
    assert (
        json.loads(out)["runs"][1].items() >= {k: summary["runs"][1][k] for k in ("run", "accuracy", "ended")}.items()
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # A run of another recipe is not passed off as one of this sweep.
    code, _, said = orpo("sweep", recipe, "--set", "loss.beta=0,0.5", "--set", "train.seed=4", *FEW, "--resume")
    assert (code, "train.seed: 3 before, now 4" in said, "the run beta-0 was refused" in said) == (2, True, True)


def test_a_template_that_writes_the_date_reads_the_same_in_all_runs(tiny_recipe, tmp_path, orpo, at_once, monkeypatch):
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b') + '. ' }}" + BUILT_IN["plain"])
    days = map(date.fromordinal, itertools.count(date(2031, 5, 4).toordinal()))

    class Passing(date):
        @classmethod
        def today(cls) -> date:
            return next(days)

    monkeypatch.setattr("orpo_cli.data.templates.date", Passing)
    recipe = tiny_recipe(model={"chat_template": f"{tmp_path}/dated.jinja"})
    arguments = ("sweep", recipe, "--set", "loss.beta=0,0.5", *FEW)
    assert orpo(*arguments)[0] == 0
    runs = [tmp_path / "run" / name for name in ("beta-0", "beta-0.5", "best.yaml")]
    [day] = {load_recipe(path / "recipe.yaml" if path.is_dir() else path).model.chat_template_date for path in runs}
    assert day >= "2031-05-04"

    before = [(run / "manifest.json").stat().st_mtime_ns for run in runs[:2]]
    assert orpo(*arguments, "--resume")[0] == 0
    assert [(run / "manifest.json").stat().st_mtime_ns for run in runs[:2]] == before


def test_a_run_that_fails_does_not_end_the_sweep(tiny_recipe, tmp_path, orpo, at_once):
    code, out, said = orpo("sweep", tiny_recipe(), "--set", "train.learning_rate=1e30,0.01", *FEW)
    assert code == 1
    assert "error: of 2 runs failed: learning_rate-1e+30\nhint: --resume" in said
    assert "failed</td>" in (tmp_path / "run/sweep.html").read_text()
    summary = json.loads(out)
    assert [run["verdict"] for run in summary["runs"]] == ["failed", "best"]
    assert load_recipe(tmp_path / "run/best.yaml").train.learning_rate == 0.01


def test_runs_judged_on_other_pairs_are_not_compared(tiny_recipe, orpo, at_once):
    code, out, said = orpo("sweep", tiny_recipe(), "--set", "data.eval={holdout: 8},{holdout: 12}", *FEW)
    assert (code, out) == (2, "")
    assert "their figures cannot be compared" in said


def test_another_order_of_the_pairs_is_told(tiny_recipe, orpo, at_once):
    code, out, said = orpo("sweep", tiny_recipe(), "--set", "train.seed=1,2", *FEW)
    assert (code, json.loads(out)["same_data_order"]) == (0, False)
    assert "warning: the runs did not see the training pairs in the same order" in said


LONG = {"max_steps": 80, "save_steps": 100_000, "eval_on_start": False}


def test_stopped_and_resumed_it_comes_to_the_same(tiny_recipe, tmp_path, orpo, at_once):
    """Real processes: a signal to the sweep alone is passed on, and its run saves the step it is at."""
    recipe = tiny_recipe(train=LONG)
    line = ["sweep", recipe, "--set", "loss.beta=0,0.5", *FEW, "--output-dir"]
    command = [sys.executable, "-m", "orpo_cli", *map(str, line), str(tmp_path / "stopped")]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "stopped/beta-0/metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert started.poll() is None
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGTERM)
    out, said = started.communicate(timeout=120)
    assert (started.returncode, out) == (143, "")
    assert said.splitlines()[-1] == "stopped by SIGTERM; --resume goes on with the sweep"
    assert len(list((tmp_path / "stopped/beta-0/checkpoints").iterdir())) == 1
    assert not (tmp_path / "stopped/beta-0/eval.json").exists()

    for name, more in (("stopped", ["--resume"]), ("undisturbed", [])):
        code, _, said = orpo(*line, tmp_path / name, *more)
        assert code == 0, said
    one, other = (
        json.loads((tmp_path / name / "sweep.json").read_text()) | {"directory": ""}
        for name in ("stopped", "undisturbed")
    )
    assert one == other
    for run in ("beta-0", "beta-0.5"):
        same_files(tmp_path / "stopped" / run, tmp_path / "undisturbed" / run, checkpoints=False)


def test_a_signal_before_the_process_is_there_is_not_lost(monkeypatch):
    """It comes while the process is being started, and reaches it all the same."""
    real = subprocess.Popen

    def popen(*arguments, **keywords):
        started = real([sys.executable, "-c", "import time; time.sleep(60)"], **keywords)
        os.kill(os.getpid(), signal.SIGTERM)
        return started

    monkeypatch.setattr(subprocess, "Popen", popen)
    began = time.monotonic()
    with pytest.raises(Stopped) as stopped:
        sweep._orpo("doctor", read=True)
    assert stopped.value.exit_code == 143
    assert time.monotonic() - began < 30


def test_real_pairs_on_a_real_model(tmp_path, orpo, at_once):
    """Two betas, a few steps: as the README says it, on a model that has learnt something."""
    recipe = {
        "model": {"name_or_path": str(shared("models/stories260K"))},
        "lora": None,
        "data": {
            "train": {"path": str(shared("data/instruction-preference.json")), "max_pairs": 80},
            "eval": {"holdout": 30},
            "max_length": 512,
        },
        "train": {"max_steps": 6, "batch_size": 8, "learning_rate": 2e-3, "eval_on_start": False},
        "output": {"dir": str(tmp_path / "sweep")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, out, said = orpo("sweep", tmp_path / "recipe.yaml", "--set", "loss.beta=0.01,0.5", *FEW)
    assert code == 0, said
    low, high = json.loads(out)["runs"]
    assert low["log_odds_ratio"] < high["log_odds_ratio"]  # what beta is for
    assert json.loads(out)["best"]["run"] in ("beta-0.01", "beta-0.5")
