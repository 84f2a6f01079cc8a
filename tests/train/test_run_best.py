"""The best evaluation: its weights, other metrics, stopping early."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orpo_cli.errors import InputError, RunError
from orpo_cli.evaluate import evaluate_target
from orpo_cli.recipe import load_recipe
from orpo_cli.runs import list_runs
from orpo_cli.train import run as run_module
from orpo_cli.train.run import Start, train
from tests.runs import contents, rows, same_files


@pytest.fixture
def ups_and_downs(tiny_recipe):
    """A recipe whose learning rate is so high that the held-out loss rises between its first steps."""

    def write(*, full: bool = False, train: dict | None = None, **changes):
        section = {"lr_scheduler_type": "constant", "warmup_steps": 0, "eval_steps": 1, "save_total_limit": 1}
        section |= {"learning_rate": 0.05, "max_steps": 6} if full else {"learning_rate": 0.3, "max_steps": 3}
        return tiny_recipe(train={**section, **(train or {})}, **({"lora": None} if full else {}), **changes)

    return write


def evaluated(run: Path, metric: str = "eval_loss") -> dict[int, float]:
    return {row["step"]: row[metric] for row in rows(run) if "eval_loss" in row and row["step"]}


@pytest.mark.parametrize("full", [False, True])
def test_a_run_may_end_with_its_best_weights(ups_and_downs, tmp_path, full):
    train(load_recipe(ups_and_downs(full=full, train={"load_best_model_at_end": True})))
    run = tmp_path / "run"
    losses = evaluated(run)
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert best < last
    figures = json.loads((run / "eval.json").read_text())
    assert figures["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert figures["loss"] < losses[last]
    assert json.loads((run / "manifest.json").read_text())["weights_of_step"] == best
    name = "model.safetensors" if full else "adapter_model.safetensors"
    checkpoint = load_file(run / "checkpoints" / f"step-{best:06d}" / name)
    kept = load_file(run / ("merged" if full else "adapter") / name)
    assert all(torch.equal(kept[key], checkpoint[key]) for key in kept)
    assert evaluate_target(str(run))["loss"] == pytest.approx(losses[best], abs=1e-5)
    assert evaluate_target(str(run / "merged"))["loss"] == pytest.approx(losses[best], abs=1e-4)
    [listed] = list_runs([run])
    assert (listed["state"], listed["step"]) == ("finished", last)
    assert listed["loss"] == figures["loss"]


def test_other_metrics_choose_other_steps(ups_and_downs, tmp_path):
    changes = {"load_best_model_at_end": True, "metric_for_best_model": "eval_log_odds_ratio"}
    train(load_recipe(ups_and_downs(train=changes)))
    ratios = evaluated(tmp_path / "run", "eval_log_odds_ratio")
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert figures["log_odds_ratio"] == pytest.approx(max(ratios.values()), rel=1e-6)


def test_a_run_that_gets_no_better_stops_early(ups_and_downs, tmp_path, capsys):
    train(
        load_recipe(
            ups_and_downs(train={"max_steps": 8, "save_total_limit": 9}, output={"dir": str(tmp_path / "whole")})
        )
    )
    losses = evaluated(tmp_path / "whole")
    best, stale, last = None, 0, 0
    for last, loss in losses.items():
        best, stale = (last, 0) if best is None or loss < losses[best] else (best, stale + 1)
        if stale == 2:
            break
    assert best < last < 8, losses

    changes = {"max_steps": 8, "early_stopping_patience": 2, "load_best_model_at_end": True}
    capsys.readouterr()
    train(load_recipe(ups_and_downs(train=changes)))
    run = tmp_path / "run"
    assert f"stopping early: eval_loss has not been better since step {best}" in capsys.readouterr().err
    assert rows(run) == [row for row in rows(tmp_path / "whole") if row["step"] <= last]
    assert json.loads((run / "eval.json").read_text())["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in sorted({best, last})
    ]
    assert json.loads((run / "manifest.json").read_text())["steps"] == last

    # It has ended: to go on with it makes no step more, also where a kill took all that follows the last checkpoint.
    interrupted = tmp_path / "interrupted"
    shutil.copytree(run, interrupted)
    for name in ("adapter", "merged"):
        shutil.rmtree(interrupted / name)
    (interrupted / "eval.json").unlink()
    train(load_recipe(ups_and_downs(train=changes, output={"dir": str(interrupted)})), Start(resume=True))
    same_files(run, interrupted)
    # And where it took the last checkpoint too, the same steps end it again.
    shutil.rmtree(interrupted / "checkpoints" / f"step-{last:06d}")
    train(load_recipe(ups_and_downs(train=changes, output={"dir": str(interrupted)})), Start(resume=True))
    same_files(run, interrupted)


def best_checkpoint(run: Path) -> Path:
    losses = evaluated(run)
    return run / "checkpoints" / f"step-{min(losses, key=lambda step: losses[step]):06d}"


def test_a_best_checkpoint_that_is_spoilt_on_the_way_is_not_ended_with(ups_and_downs, tmp_path, monkeypatch):
    steps = run_module.train_steps

    def then_spoilt(loop):
        steps(loop)
        weights = best_checkpoint(tmp_path / "run") / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(run_module, "train_steps", then_spoilt)
    with pytest.raises(
        RunError, match=r"the best checkpoint, .*, cannot be used: adapter_model.safetensors has changed"
    ):
        train(load_recipe(ups_and_downs(train={"load_best_model_at_end": True})))


@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda best: (best / "state.json").unlink()])
def test_a_run_whose_best_checkpoint_is_gone_is_not_gone_on_with_before_that_is_decided(ups_and_downs, tmp_path, spoil):
    changes = {"load_best_model_at_end": True, "save_total_limit": 9}
    train(load_recipe(ups_and_downs(train=changes)))
    run = tmp_path / "run"
    losses = evaluated(run)
    assert losses[1] < min(losses[2], losses[3])
    spoil(best_checkpoint(run))
    before = contents(run)
    for start in (Start(resume=True), Start(resume_from=run / "checkpoints/step-000002")):
        with pytest.raises(InputError, match=r"the best checkpoint up to .*, cannot be used: .*(not there|missing)"):
            train(load_recipe(ups_and_downs(train=changes)), start)
        assert contents(run) == before
    train(load_recipe(ups_and_downs()), Start(resume=True, allow_changes=True))
    assert json.loads((run / "eval.json").read_text())["loss"] == pytest.approx(losses[3], rel=1e-6)
