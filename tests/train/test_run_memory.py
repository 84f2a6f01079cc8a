"""Memory that runs out, or is planned for, and micro-batches side by side: fewer tokens at once, the same numbers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orpo_cli.errors import RunError
from orpo_cli.model import lanes
from orpo_cli.model.budget import FAST_TOKENS
from orpo_cli.model.lanes import in_lanes
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.recipe import load_recipe
from orpo_cli.train import loop
from orpo_cli.train.run import Start, train
from tests.runs import losses


def with_little_memory(monkeypatch, tokens: int) -> list[int]:
    """A device on which no more than so many tokens' gradients can be computed at once; the sizes that were tried."""
    tried: list[int] = []
    forward = PairLogprobs.forward

    def limited(self, batch):
        if not torch.is_grad_enabled() or batch.pairs[0].chosen_start == 1:  # an evaluation, or the estimate's pair
            return forward(self, batch)
        tried.append(batch.tokens)
        logps = forward(self, batch)  # it runs out halfway, and with the gradients of other micro-batches there
        if batch.tokens > tokens:
            raise torch.OutOfMemoryError("out of memory")
        return logps

    monkeypatch.setattr(PairLogprobs, "forward", limited)
    return tried


@pytest.mark.parametrize("changes", [{}, {"lora": None, "model": {"dtype": "bfloat16", "shared_prefix": False}}])
def test_a_step_that_runs_out_of_memory_is_computed_anew_in_smaller_parts(tiny_recipe, tmp_path, monkeypatch, changes):
    """And so the run ends as one that has had the smaller budget from the start."""
    changes = {"lora": {"r": 4, "dropout": 0.2}, **changes}
    monkeypatch.setitem(FAST_TOKENS, "cpu", (300, 1))
    with monkeypatch.context() as limited:
        tried = with_little_memory(limited, 120)
        train(load_recipe(tiny_recipe(**changes, output={"dir": str(tmp_path / "auto")})))
    assert any(size > 120 for size in tried)
    state = json.loads((tmp_path / "auto/checkpoints/step-000004/state.json").read_text())
    assert 60 < state["max_tokens"] <= 150
    budget = {"max_tokens_per_microbatch": state["max_tokens"]}
    train(load_recipe(tiny_recipe(**changes, train=budget, output={"dir": str(tmp_path / "given")})))
    files = {p.relative_to(tmp_path / "given") for p in (tmp_path / "given").glob("**/*.safetensors")}
    assert len(files) > 3
    for name in files:
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "auto" / name).read_bytes(), name
    assert losses(tmp_path / "given").tolist() == losses(tmp_path / "auto").tolist()


@pytest.fixture
def short_lanes(monkeypatch) -> Iterator[list[int]]:
    """Small models and few tokens train in two lanes, however many cores there are; how many went in each round."""
    together: list[int] = []

    def noted(work, items):
        assert len(items) == 2
        together.append(len(items))
        return in_lanes(work, items)

    monkeypatch.setattr(lanes, "LANE_TOKENS", 75)
    monkeypatch.setattr(lanes, "TRAINED_SHARE", 1.0)
    monkeypatch.setattr(loop, "in_lanes", noted)
    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    yield together
    torch.set_num_threads(cores)


IN_LANES = {"lora": {"r": 4, "dropout": 0.0}, "train": {"max_tokens_per_microbatch": 150, "save_steps": 2}}


def test_lanes_change_only_rounding_and_give_the_same_bytes_again(tiny_recipe, tmp_path, short_lanes, monkeypatch):
    def run(name: str, start: Start | None = None) -> Path:
        train(load_recipe(tiny_recipe(**IN_LANES, output={"dir": str(tmp_path / name)})), start)
        return tmp_path / name

    first = run("first")
    rounds = len(short_lanes)
    assert rounds > 4
    again = run("again")
    # Broken off after its second step, it goes on to the same end.
    shutil.copytree(first, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-000004")
    short_lanes.clear()
    resumed = run("resumed", Start(resume=True))
    assert 1 < len(short_lanes) < rounds
    for other in (again, resumed):
        for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
            assert (other / name).read_bytes() == (first / name).read_bytes(), name
        assert losses(other).tolist() == losses(first).tolist()

    short_lanes.clear()
    monkeypatch.setattr(lanes, "LANE_TOKENS", 10_000)
    one = run("one")
    assert not short_lanes
    torch.testing.assert_close(losses(one), losses(first), rtol=2e-5, atol=0)
    mine, theirs = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, first))
    for name, weight in mine.items():
        assert (weight - theirs[name]).norm() < 1e-2 * weight.norm(), name


def test_memory_that_runs_out_in_a_lane_means_fewer_tokens_at_once(tiny_recipe, tmp_path, short_lanes, monkeypatch):
    monkeypatch.setitem(FAST_TOKENS, "cpu", (300, 1))
    with monkeypatch.context() as limited:
        tried = with_little_memory(limited, 120)
        train(load_recipe(tiny_recipe(lora=IN_LANES["lora"], output={"dir": str(tmp_path / "auto")})))
    assert 2 in short_lanes
    assert any(size > 120 for size in tried)
    state = json.loads((tmp_path / "auto/checkpoints/step-000004/state.json").read_text())
    assert state["max_tokens"] <= 150
    budget = {"max_tokens_per_microbatch": state["max_tokens"]}
    train(load_recipe(tiny_recipe(lora=IN_LANES["lora"], train=budget, output={"dir": str(tmp_path / "given")})))
    assert losses(tmp_path / "given").tolist() == losses(tmp_path / "auto").tolist()


@pytest.mark.parametrize("budget", ["auto", 300])
def test_memory_that_no_smaller_budget_saves_is_an_error(tiny_recipe, tmp_path, monkeypatch, budget):
    tried = with_little_memory(monkeypatch, 0)
    with pytest.raises(RunError, match="out of memory with") as caught:
        train(load_recipe(tiny_recipe(train={"max_tokens_per_microbatch": budget})))
    assert "--resume" in caught.value.hint
    if budget == "auto":  # down to where the longest pair is by itself
        assert sorted(tried, reverse=True) == tried
        assert len(tried) > 2
    else:  # what is given is not changed
        assert len(tried) == 1


def test_little_memory_means_checkpointed_layers_and_the_same_numbers(tiny_recipe, tmp_path, monkeypatch):
    train(load_recipe(tiny_recipe(output={"dir": str(tmp_path / "roomy")})))
    roomy = json.loads((tmp_path / "roomy/manifest.json").read_text())["memory"]
    assert roomy["checkpointed_layers"] == 0
    assert roomy["estimated_bytes"]["total"] < roomy["available_bytes"]
    monkeypatch.setattr("orpo_cli.train.run.device_memory", lambda device: roomy["estimated_bytes"]["weights"])
    train(load_recipe(tiny_recipe(output={"dir": str(tmp_path / "tight")})))
    manifest = json.loads((tmp_path / "tight/manifest.json").read_text())
    assert manifest["memory"]["checkpointed_layers"] > 0
    assert manifest["max_tokens_per_microbatch"] == 82  # the longest pair
    torch.testing.assert_close(losses(tmp_path / "tight"), losses(tmp_path / "roomy"), rtol=2e-5, atol=0)
    # What a run has begun with stays, whatever the device would be given today.
    monkeypatch.undo()
    (tmp_path / "tight/eval.json").unlink()
    train(load_recipe(tiny_recipe(output={"dir": str(tmp_path / "tight")})), Start(resume=True))
    assert json.loads((tmp_path / "tight/manifest.json").read_text())["max_tokens_per_microbatch"] == 82


def test_a_plan_that_does_not_fit_says_what_would_help(tiny_recipe, monkeypatch, capfd):
    monkeypatch.setattr("orpo_cli.train.run.device_memory", lambda device: 1000)
    train(load_recipe(tiny_recipe(lora=None, model={"gradient_checkpointing": False}, train={"max_steps": 2})))
    told = capfd.readouterr().err
    assert "82 tokens at once, 0 of 2 layers checkpointed" in told
    assert "model.gradient_checkpointing: auto, train.optimizer: adamw_8bit, an adapter" in told
    assert told.index("memory:") < told.index("step 1/2")
