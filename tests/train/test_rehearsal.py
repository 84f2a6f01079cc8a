"""The longest micro-batches before the first step: they are computed, and nothing of the run shows that they were."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from orpo_cli.data.batches import flat_tokens
from orpo_cli.metrics import comparable, read_metrics
from orpo_cli.model.budget import Plan
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.memory import made_up_pair
from orpo_cli.recipe import load_recipe
from orpo_cli.train import run as training
from orpo_cli.train.distributed import random_states_kept, seed_everything
from orpo_cli.train.rehearsal import largest, rehearse
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """So that there is a rehearsal."""
    monkeypatch.setattr(Plan, "is_roomy", False)


def files(directory: Path) -> dict[str, bytes]:
    """What equal runs must have alike: tensors, figures, and the numbers of metrics.jsonl but times and memory."""
    found = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.safetensors")}
    figures = [comparable(row) for row in read_metrics(directory / "metrics.jsonl")]
    return found | {"eval.json": (directory / "eval.json").read_bytes(), "metrics": str(figures).encode()}


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"r": 4, "dropout": 0.2}},
        {
            "lora": None,
            "model": {"dtype": "bfloat16"},
            "data": {"streaming": True},
            "loss": {"nll_tokens": "assistant"},
        },
        {"model": {"dtype": "float16", "shared_prefix": False}},
    ],
)
def test_the_run_is_the_one_without_it(tiny_recipe, tmp_path, monkeypatch, changes):
    rehearsed = []
    monkeypatch.setattr(training, "rehearse", lambda run: rehearsed.append(rehearse(run)))
    training.train(load_recipe(tiny_recipe(**changes, output={"dir": str(tmp_path / "with")})))
    monkeypatch.setattr(training, "rehearse", lambda run: None)
    training.train(load_recipe(tiny_recipe(**changes, output={"dir": str(tmp_path / "without")})))
    assert len(rehearsed) == 1
    got, expected = files(tmp_path / "with"), files(tmp_path / "without")
    assert got.keys() == expected.keys()
    for name, content in got.items():
        assert content == expected[name], name


@pytest.mark.parametrize("streaming", [False, True])
def test_no_later_micro_batch_has_a_longer_pair(tiny_recipe, monkeypatch, streaming):
    sizes: dict[bool, list[tuple[int, bool]]] = {True: [], False: []}
    rehearsing, forward = True, PairLogprobs.forward

    def watched(self, batch):
        sizes[rehearsing].append((max(map(flat_tokens, batch.pairs)), torch.is_grad_enabled()))
        return forward(self, batch)

    def rehearse_watched(run):
        nonlocal rehearsing
        monkeypatch.setattr(PairLogprobs, "forward", watched)
        rehearse(run)
        rehearsing = False

    monkeypatch.setattr(training, "rehearse", rehearse_watched)
    training.train(load_recipe(tiny_recipe(data={"streaming": streaming}, train={"max_steps": 8})))
    for with_gradients in (True, False):
        tried, later = ([size for size, grad in sizes[when] if grad == with_gradients] for when in (True, False))
        assert max(later) <= max(tried)
        assert len(tried) < len(later)
    if streaming:
        assert max(size for size, grad in sizes[True] if grad) == flat_tokens(made_up_pair(128, 100)) == 255


def test_where_there_is_room_on_a_cpu_there_is_none(tiny_recipe, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(training, "rehearse", lambda run: calls.append(run))
    for roomy in (True, False):
        monkeypatch.setattr(Plan, "is_roomy", roomy)
        training.train(load_recipe(tiny_recipe(output={"dir": str(tmp_path / str(roomy))})))
        assert len(calls) == int(not roomy)


def test_the_longest_pair_is_tried_wherever_it_stands():
    lengths = [1000, *[512] * 15]
    pairs = [made_up_pair(length // 2, 100) for length in lengths]
    logprobs = PairLogprobs(tiny_model("llama"), shares_prefix=True)
    rounds = logprobs.rounds(pairs, 2048, lanes=2)
    longest = max(pairs, key=flat_tokens)
    assert all(pair is not longest for part in rounds[0] for pair in part)  # else this would show nothing
    tried = largest(logprobs, rounds)
    assert any(pair is longest for pair in tried)
    most = max(sum(flat_tokens(pair) for part in parts for pair in part) for parts in rounds)
    assert sum(map(flat_tokens, tried)) >= most


def test_random_states_are_what_they_were():
    seed_everything(7)
    expected = random.random(), np.random.random(), torch.rand(3).tolist()
    seed_everything(7)
    with random_states_kept(torch.device("cpu")):
        seed_everything(8)
        torch.rand(5)
    assert (random.random(), np.random.random(), torch.rand(3).tolist()) == expected
