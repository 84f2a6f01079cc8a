"""Steps whose numbers are bad are not taken; losses that stand out are told, and healthy scatter is not."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_cli.errors import RunError, Stopped
from orpo_cli.recipe import load_recipe
from orpo_cli.train import loop
from orpo_cli.train.checkpoint import checkpoints, load_checkpoint
from orpo_cli.train.run import Start, train
from orpo_cli.train.spikes import LEAST, WINDOW, is_spike
from tests.runs import rows, same_files


def spikes(losses: np.ndarray) -> list[int]:
    return [i for i in range(len(losses)) if is_spike(losses[i], list(losses[max(0, i - WINDOW) : i]))]


STEPS = 2000
HEALTHY = {
    "quiet": lambda draw: 1.5 + 0.01 * draw.normal(size=STEPS),
    "noisy": lambda draw: 1.5 + 0.3 * draw.normal(size=STEPS).clip(-4, 4),
    "skewed, as of single pairs": lambda draw: draw.lognormal(0.3, 0.6, STEPS),
    "falling": lambda draw: (0.8 + 2 * np.exp(-np.arange(STEPS) / 150)) * draw.lognormal(0, 0.1, STEPS),
    "two kinds of data": lambda draw: np.where(draw.random(STEPS) < 0.1, 3.0, 0.5) * draw.lognormal(0, 0.1, STEPS),
    "learnt by heart, epoch by epoch": lambda draw: (
        1.5 * 0.4 ** (np.arange(STEPS) // 400) * draw.lognormal(0, 0.1, STEPS)
    ),
    "all the same": lambda draw: np.full(STEPS, 0.7),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_losses_raise_no_alarm(kind):
    found = [spikes(HEALTHY[kind](np.random.default_rng(seed))) for seed in range(5)]
    assert sum(map(len, found)) <= 2, found  # in 10,000 steps


@pytest.mark.parametrize("scatter", [0.01, 0.05, 0.1])
def test_a_spike_is_found_once_and_where_it_is(scatter):
    for seed in range(5):
        losses = np.random.default_rng(seed).lognormal(0.2, scatter, 300)
        losses[200:203] *= [1.2, 2.5, 2.2]
        assert spikes(losses) == [201]


def test_a_new_level_is_told_of_and_then_accepted():
    draw = np.random.default_rng(0)
    losses = np.concatenate([draw.lognormal(0, 0.05, 200), 3 * draw.lognormal(0, 0.05, 400)])
    assert 200 in spikes(losses)
    assert len(spikes(losses)) < 8
    assert not [i for i in spikes(losses) if i > 200 + WINDOW]


def test_nothing_is_judged_by_a_few_steps():
    assert not is_spike(1e9, [1.0] * (LEAST - 1))
    assert is_spike(1e9, [1.0] * LEAST)


def shaken(monkeypatch, factors: dict[int, float]) -> None:
    """Multiply what the steps of these numbers report as loss, and their gradients with it."""
    step_gradients = loop.step_gradients

    def scaled(run, step, data):
        sums = step_gradients(run, step, data)
        if step in factors:
            for gradient in run.optimizer.gradients():
                gradient.mul_(factors[step])
            sums[:-1] *= factors[step]
        return sums

    monkeypatch.setattr(loop, "step_gradients", scaled)


LONG = {"train": {"max_steps": 40, "save_steps": 10, "learning_rate": 1e-4, "save_total_limit": 9}}


def test_a_spike_is_in_the_log_the_row_and_the_resumed_run(tiny_recipe, tmp_path, monkeypatch, capfd):
    shaken(monkeypatch, {37: 10.0})
    train(load_recipe(tiny_recipe(**LONG, output={"dir": str(tmp_path / "whole")})))
    assert capfd.readouterr().err.count("stands out") == 1
    [spike] = [row for row in rows(tmp_path / "whole") if "spike" in row]
    assert spike["step"] == 37
    assert spike["spike"] is True
    assert len(spike["indices"]) == spike["pairs"] == 8

    recipe = load_recipe(tiny_recipe(**LONG, output={"dir": str(tmp_path / "stopped")}))
    with monkeypatch.context() as stopping:
        stopping.setattr(loop, "conclude_step", stop_after(33, loop.conclude_step))
        with pytest.raises(Stopped):
            train(recipe)
    train(recipe, Start(resume=True))
    same_files(tmp_path / "whole", tmp_path / "stopped", checkpoints=False)


def stop_after(step, conclude_step):
    def conclude(run, stop, display):
        conclude_step(run, stop, display)
        if run.progress.step == step:
            stop.number = 15

    return conclude


def test_no_healthy_run_has_a_spike(tiny_recipe, tmp_path):
    train(load_recipe(tiny_recipe(train={"max_steps": 60, "save_steps": 60, "batch_size": 1, "learning_rate": 1e-3})))
    assert not [row for row in rows(tmp_path / "run") if "spike" in row]


def test_steps_gone_bad_are_not_taken_named_and_counted_over_a_resume(tiny_recipe, tmp_path, monkeypatch, capfd):
    shaken(monkeypatch, dict.fromkeys((3, 4, 9, 10, 11), float("nan")))
    changes = {"train": {"max_steps": 24, "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-3}}
    with pytest.raises(RunError, match="not finite in 3 steps in a row"):
        train(load_recipe(tiny_recipe(**changes, output={"dir": str(tmp_path / "whole")})))
    skipped = [row for row in rows(tmp_path / "whole") if "skipped" in row]
    assert [row["step"] for row in skipped] == [3, 4, 9, 10, 11]
    assert all(row["loss"] is None and len(row["indices"]) == 8 for row in skipped)
    told = capfd.readouterr().err
    for row in skipped:
        assert (
            f"step {row['step']} skipped: its loss is not finite (rows {', '.join(map(str, row['indices']))})" in told
        )
    # What is left is from before the steps that ended the run.
    assert [path.name for path in checkpoints(tmp_path / "whole/checkpoints")] == ["step-000007", "step-000008"]
    weights, _, state = load_checkpoint(tmp_path / "whole/checkpoints/step-000008")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert state["bad_steps"] == 0

    # Stopped by a signal among them, it ends no later.
    recipe = load_recipe(tiny_recipe(**changes, output={"dir": str(tmp_path / "stopped")}))
    with monkeypatch.context() as stopping:
        stopping.setattr(loop, "conclude_step", stop_after(10, loop.conclude_step))
        with pytest.raises(Stopped):
            train(recipe)
    state = json.loads((tmp_path / "stopped/checkpoints/step-000010/state.json").read_text())
    assert state["bad_steps"] == 2
    with pytest.raises(RunError, match="not finite in 3 steps in a row"):
        train(recipe, Start(resume=True))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def test_a_model_that_overflows_is_not_trained(tiny_recipe, tiny_base, tmp_path):
    """Finite weights, the numbers computed with them are not."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = 1e38
        model.model.layers[1].mlp.down_proj.weight[:, 0] = 1e38
    model.save_pretrained(tmp_path / "ill")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "ill")
    recipe = load_recipe(tiny_recipe(model={"name_or_path": str(tmp_path / "ill"), "shared_prefix": False}))
    with pytest.raises(RunError, match="the loss was not finite in 3 steps in a row"):
        train(recipe)
    assert [row["skipped"] for row in rows(tmp_path / "run") if "loss" in row] == [True] * 3
    assert not checkpoints(tmp_path / "run/checkpoints")
