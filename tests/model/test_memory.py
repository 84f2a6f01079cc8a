"""Estimates against what a step really allocates; plans that fit; checkpointing that changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_cli.data.batches import flat_batch
from orpo_cli.model import memory
from orpo_cli.model.load import load_model
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.lora import add_lora
from orpo_cli.model.memory import (
    Activations,
    Memory,
    Needs,
    checkpoint_layers,
    checkpointable_layers,
    choose_plan,
    fixed_memory,
    scoring_tokens,
)
from orpo_cli.recipe import LoraSection, ModelSection, TrainSection, load_recipe
from orpo_cli.train.optimizer import Optimizer
from tests.tiny import FAMILIES, random_pairs, tiny_model

CPU = torch.device("cpu")
LENGTH, PAIRS = 200, 4


def llama(dtype: torch.dtype, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


class Allocated(TorchDispatchMode):
    """Follows the bytes of all storages that operations hand out, and how many were there at once at most."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0
        self.note(there)

    def note(self, tensors: list[object]) -> None:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.alive.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.note(tree_leaves(out))
        return out


@pytest.mark.parametrize("checkpointed", [0, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "lora", "shares_prefix", "optimizer"),
    [
        (torch.bfloat16, True, True, "adamw"),
        (torch.bfloat16, True, False, "adamw"),
        (torch.bfloat16, False, True, "adamw"),
        (torch.bfloat16, False, True, "adamw_8bit"),
        (torch.float32, False, True, "adamw"),
    ],
)
def test_the_estimate_is_what_a_step_allocates(dtype, lora, shares_prefix, optimizer, checkpointed):
    """To a tenth. In the second micro-batch gradients are there beside activations."""
    base = llama(dtype)
    model = add_lora(base, LoraSection(r=4), []) if lora else base
    engine = PairLogprobs(base, shares_prefix)
    needs = Needs.of(engine, LENGTH, optimizer)
    checkpoint_layers(base, checkpointed)
    batch = flat_batch([memory.made_up_pair(LENGTH, 2000)] * PAIRS, "response")
    steps = Optimizer(model.named_parameters(), TrainSection(optimizer=optimizer))

    def step() -> None:
        for _ in range(2):
            engine(batch).sum().backward()
        steps.step(0.0)

    step()  # from here on the moments are there
    moments = [value for state in steps.adamw.state.values() for value in state.values()]
    with Allocated([*base.parameters(), *base.buffers(), *steps.masters.values(), *moments]) as allocated:
        step()
    expected = needs.training(batch.tokens, checkpointed)
    assert expected.total == pytest.approx(allocated.most, rel=0.1)
    assert (expected.adapters > 0) == lora
    assert (expected.masters > 0) == (dtype != torch.float32 and not lora)


def test_what_is_kept_is_counted_to_the_byte():
    """Against a pass that keeps it all, and looks afterwards at what is there."""
    model = llama(torch.float32)
    engine = PairLogprobs(model, shares_prefix=True)
    batch = flat_batch([memory.made_up_pair(LENGTH, 2000)], "response")
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = engine(batch)
    assert out.requires_grad
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    total = sum(size for key, size in storages.items() if key not in own)
    measured = memory._kept_of_a_pair(engine, LENGTH)
    assert measured.of_token(0) * batch.tokens == pytest.approx(total, rel=1e-9)
    assert measured.layer_input == 64 * 4
    assert len(measured.layers) == 4
    assert max(measured.layers) == measured.widest


def test_longer_pairs_follow_from_shorter_ones():
    """The folded attention keeps its probabilities: the more of a token, the longer its sequence."""
    model = llama(torch.bfloat16)
    engine = PairLogprobs(model, shares_prefix=True)
    expected = memory._kept_of_a_pair(engine, 2000).of_token(0)
    assert expected > 1.4 * memory._kept_of_a_pair(engine, 1000).of_token(0)
    assert memory.measure_activations(engine, 2000).of_token(0) == pytest.approx(expected, rel=0.02)


def test_measuring_leaves_nothing_behind():
    model = llama(torch.float32)
    checkpoint_layers(model, 3)
    engine = PairLogprobs(model, shares_prefix=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    Needs.of(engine, LENGTH, "adamw")
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [layer.gradient_checkpointing for layer in checkpointable_layers(model)] == [True] * 3 + [False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_model_is_measured_as_well():
    model = llama(torch.float32).requires_grad_(False)
    needs = Needs.of(PairLogprobs(model, shares_prefix=True), LENGTH, None)
    scoring = needs.scoring(1000)
    assert scoring.gradients == scoring.optimizer == scoring.activations == 0
    assert 0 < scoring.total < needs.training(1000, 0).total


def test_weights_are_counted_once_and_as_they_lie_there(tmp_path):
    half, full = (fixed_memory(llama(dtype, tied=True), "adamw") for dtype in (torch.bfloat16, torch.float32))
    numbers = sum(p.numel() for p in llama(torch.float32, tied=True).parameters())
    inv_freq = 8 * 4  # float32 in either, and there twice
    assert abs(full.weights - 4 * numbers) <= 2 * inv_freq
    assert abs(half.weights - 2 * numbers) <= 2 * inv_freq
    assert half.masters == half.gradients == full.gradients == 4 * numbers
    assert full.masters == 0

    llama(torch.bfloat16).save_pretrained(tmp_path)
    packed = load_model(ModelSection(name_or_path=str(tmp_path), load_in_4bit=True), CPU).requires_grad_(False)
    matrices = sum(p.numel() for name, p in llama(torch.bfloat16).named_parameters() if "_proj" in name)
    others = sum(p.numel() for name, p in packed.named_parameters() if "_proj" not in name)
    # Half a byte each, a scale of one byte for every 64, and a few tables.
    assert 0.5 * matrices < fixed_memory(packed, "adamw").weights - 2 * others < (0.5 + 1 / 64) * matrices + 28 * 2500


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_moments_are_counted_as_the_optimizer_makes_them(kind):
    model = llama(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), TrainSection(optimizer=kind))
    optimizer.gradients()
    optimizer.step(0.0)
    tables = ("step", "qmap")
    moments = [tensor for name, tensor in optimizer.tensors().items() if not name.startswith((*tables, "master"))]
    assert fixed_memory(model, kind).optimizer == sum(tensor.nbytes for tensor in moments)
    assert fixed_memory(model, f"paged_{kind}").optimizer == 0  # on the device only while there is room


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_measured(family):
    model = tiny_model(family).train()
    shares = FAMILIES[family].not_shared is None
    engine = PairLogprobs(model, shares, full_logits=FAMILIES[family].full_logits)
    needs = Needs.of(engine, 40, "adamw")
    assert needs.layers == model.config.get_text_config().num_hidden_layers
    assert all(kept > needs.activations.layer_input for kept in needs.activations.layers)


# Gradient checkpointing


@pytest.mark.parametrize("shares_prefix", [True, False])
def test_any_number_of_checkpointed_layers_gives_the_same_gradients(shares_prefix):
    batch, results = flat_batch(random_pairs(4, seed=3, vocabulary=2000), "response"), []
    for count in range(5):
        model = llama(torch.float32).train()
        checkpoint_layers(model, count)
        assert sum(layer.gradient_checkpointing for layer in checkpointable_layers(model)) == count
        calls = []
        first = checkpointable_layers(model)[0].input_layernorm
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        PairLogprobs(model, shares_prefix)(batch).sum().backward()
        assert len(calls) == (2 if count else 1)
        results.append({name: p.grad for name, p in model.named_parameters()})
    for gradients in results[1:]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][name], rtol=1e-6, atol=1e-6)


# The choice

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
    assert (roomy.max_tokens, roomy.checkpointed_layers) == (memory.FAST_TOKENS["cpu"][0], 0)
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
    assert long.max_tokens == memory.FAST_TOKENS["cpu"][0] < 10_000
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
    engine = PairLogprobs(llama(torch.float32).requires_grad_(False), shares_prefix=True)
    recipe = load_recipe(tiny_recipe())
    most = memory.SCORING_TOKENS["cpu"]
    assert scoring_tokens(engine, recipe) == most
    needs = Needs.of(engine, recipe.data.max_length, None)
    monkeypatch.setattr(memory, "device_memory", lambda device: needs.scoring(most // 4).total)
    assert scoring_tokens(engine, recipe) == most // 4
    monkeypatch.setattr(memory, "device_memory", lambda device: 0)
    assert scoring_tokens(engine, recipe) == 2 * recipe.data.max_length
    explicit = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_tokens_per_microbatch": 77})})
    assert scoring_tokens(engine, explicit) == 77


def test_the_parts_add_up_but_for_what_is_never_there_together():
    parts = Memory(weights=1, adapters=2, masters=4, gradients=8, optimizer=16, activations=32, backward=64, logprobs=5)
    assert parts.total == 1 + 2 + 4 + 8 + 16 + 32 + 64
    assert replace(parts, logprobs=100).total == 63 + 100
