"""Estimates against what a step really allocates."""

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
from orpo_cli.model.checkpointing import checkpoint_layers, checkpointable_layers
from orpo_cli.model.load import load_model
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.lora import add_lora
from orpo_cli.model.memory import Memory, Needs, fixed_memory
from orpo_cli.recipe import LoraSection, ModelSection, TrainSection
from orpo_cli.train.optimizer import Optimizer
from tests.tiny import FAMILIES, tiny_model

CPU = torch.device("cpu")
LENGTH, PAIRS = 120, 7


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
    """The attention keeps its probabilities: the more of a token, the longer its sequence."""
    model = llama(torch.bfloat16)
    engine = PairLogprobs(model, shares_prefix=True)
    expected = memory._kept_of_a_pair(engine, 2000).of_token(0)
    assert expected > 1.4 * memory._kept_of_a_pair(engine, 1000).of_token(0)
    assert memory.measure_activations(engine, 2000).of_token(0) == pytest.approx(expected, rel=0.02)


def test_a_pair_in_one_block_may_keep_more_than_a_longer_one():
    engine = PairLogprobs(llama(torch.bfloat16), shares_prefix=True)
    of_one_block, longer = (memory._kept_of_a_pair(engine, length).of_token(0) for length in (128, 140))
    assert of_one_block > longer
    assert memory.measure_activations(engine, 140).of_token(0) >= of_one_block


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


def test_the_parts_add_up_but_for_what_is_never_there_together():
    parts = Memory(weights=1, adapters=2, masters=4, gradients=8, optimizer=16, activations=32, backward=64, logprobs=5)
    assert parts.total == 1 + 2 + 4 + 8 + 16 + 32 + 64
    assert replace(parts, logprobs=100).total == 63 + 100
