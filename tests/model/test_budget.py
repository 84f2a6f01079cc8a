"""Plans that fit, and of those that do the fastest."""

from dataclasses import replace

import torch

from orpo_cli.model import budget
from orpo_cli.model.budget import FAST_TOKENS, SCORING_TOKENS, choose_plan, scoring_tokens
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.memory import Activations, Memory, Needs
from orpo_cli.recipe import load_recipe
from tests.tiny import tiny_model

CPU = torch.device("cpu")

NEEDS = Needs(
    fixed=Memory(weights=1000, gradients=100, optimizer=200),
    activations=Activations(layers=(1.0,) * 8, layer_input=0.1, outside=0.2, widest=1.0),
    head=50,
    head_row=0,
)


def plan(available: int, **changes):
    arguments = {"longest_pair": 512, "pairs": 1000, "recomputed": 0.5, **changes}
    return choose_plan(NEEDS, CPU, available, **arguments)


def test_the_less_memory_the_slower_the_plan_and_each_fits():
    plans = [plan(available) for available in range(60_000, 1_000, -100)]
    roomy, tight = plans[0], [p for p in plans if p.fits][-1]
    assert (roomy.max_tokens, roomy.checkpointed_layers) == (FAST_TOKENS["cpu"][0], 0)
    assert tight.max_tokens == 512
    assert tight.checkpointed_layers >= 7  # the last layer's activations are there in any case
    times = [(1 + 128 / p.max_tokens) * (1 + 0.5 * p.checkpointed_layers / 8) for p in plans if p.fits]
    assert times == sorted(times)
    assert len(set(times)) > 8  # a budget of its own, and a number of layers, for many a size
    assert len({p.checkpointed_layers for p in plans}) > 4
    for p in plans:
        assert p.memory.total == NEEDS.training(p.max_tokens, p.checkpointed_layers).total
        assert p.fits == (p.memory.total <= p.available)
    # What does not fit is not for want of a plan that would.
    least = min(NEEDS.training(512, count).total for count in range(9))
    assert all(p.fits == (p.available >= least) for p in plans)
    assert not plans[-1].fits
    assert plans[-1].memory.total == least


def test_what_is_given_is_taken_as_it_is():
    assert plan(60_000, max_tokens=100, checkpointed_layers=3).max_tokens == 100
    assert plan(60_000, max_tokens=100).memory == NEEDS.training(512, 0)  # a pair is never split
    assert plan(60_000, max_tokens=100_000, pairs=4).memory == NEEDS.training(4 * 512, 0)  # nor a step enlarged
    crowded = plan(8_000, max_tokens=2048)
    assert crowded.fits
    assert 0 < crowded.checkpointed_layers < 8
    assert plan(2_000, checkpointed_layers=0).checkpointed_layers == 0
    assert not plan(2_000, checkpointed_layers=0).fits
    long = plan(20_000, longest_pair=10_000)  # longer than what is fast: a micro-batch of its own, and planned for
    assert long.max_tokens == FAST_TOKENS["cpu"][0] < 10_000
    assert long.memory.activations == plan(20_000, max_tokens=10_000, longest_pair=10_000).memory.activations


def test_what_is_there_once_a_lane_is_counted_as_often():
    fixed = replace(NEEDS.fixed, backward=7)
    one, two = (replace(NEEDS, fixed=fixed).training(1024, 0, lanes) for lanes in (1, 2))
    assert two.logprobs == 2 * one.logprobs == 2 * NEEDS.head
    assert two.backward - one.backward == 7
    assert two.gradients == 3 * one.gradients  # each lane's, and their sum
    assert two.activations == one.activations
    planned = choose_plan(
        replace(NEEDS, most_lanes=2), CPU, 10**6, longest_pair=512, pairs=1, recomputed=0.5, max_tokens=2048
    )
    assert planned.memory == NEEDS.training(512, 0, 2)  # by the budget, as the run does, not by what there is to do
    assert replace(NEEDS, most_lanes=2).scoring(4096) == NEEDS.scoring(4096)


def test_twice_the_memory_is_roomy():
    needed = plan(60_000).memory.total
    assert replace(plan(60_000), available=2 * needed).is_roomy
    assert not replace(plan(60_000), available=2 * needed - 1).is_roomy


def test_scoring_takes_more_tokens_at_once_where_they_fit(tiny_recipe, monkeypatch):
    engine = PairLogprobs(tiny_model("llama").requires_grad_(False), shares_prefix=True)
    recipe = load_recipe(tiny_recipe())
    most = SCORING_TOKENS["cpu"]
    assert scoring_tokens(engine, recipe) == most
    needs = Needs.of(engine, recipe.data.max_length, None)
    monkeypatch.setattr(budget, "device_memory", lambda device: needs.scoring(most // 4).total)
    assert scoring_tokens(engine, recipe) == most // 4
    monkeypatch.setattr(budget, "device_memory", lambda device: 0)
    assert scoring_tokens(engine, recipe) == 2 * recipe.data.max_length
    explicit = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_tokens_per_microbatch": 77})})
    assert scoring_tokens(engine, explicit) == 77
