"""Gated MLPs in one function against the families' own modules: values, gradients, what is kept, what is left alone."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from orpo_cli.model.fused_lora import fuse_lora
from orpo_cli.model.fused_mlp import fuse_mlps, gated
from orpo_cli.model.lora import add_lora
from orpo_cli.recipe import LoraSection
from tests.tiny import random_pairs, tiny_model

# A model of two layers has two MLPs; phi3 has one product for gate and up, gpt2 no gate.
MLPS = {
    "llama": 2,
    "qwen3": 2,
    "gemma2": 2,
    "gemma3_text": 2,
    "olmo2": 2,
    "granite": 2,
    "cohere": 2,
    "phi3": 0,
    "gpt2": 0,
}


def loss_and_gradients(model):
    torch.manual_seed(0)  # for dropout
    ids = torch.from_numpy(random_pairs(1)[0].chosen_ids)[None]
    hidden = model.base_model(ids).last_hidden_state
    loss = (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum()
    model.zero_grad()
    loss.backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_equal(got, expected):
    assert torch.equal(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    for name, gradient in got[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", MLPS)
def test_values_and_gradients_are_the_familys_own(family):
    model = tiny_model(family)
    expected = loss_and_gradients(model)
    assert fuse_mlps(model) == MLPS[family]
    check_equal(loss_and_gradients(model), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_under_adapters_as_well(dropout):
    model = tiny_model("llama")
    add_lora(model, LoraSection(r=4, dropout=dropout), []).train()  # puts the layers into the model itself
    fuse_lora(model)
    state = torch.get_rng_state()
    expected = loss_and_gradients(model)
    torch.set_rng_state(state)
    assert fuse_mlps(model) == 2
    assert torch.equal(torch.get_rng_state(), state)
    check_equal(loss_and_gradients(model), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_gradients_are_those_of_the_formula_in_float64(activation):
    activation = ACT2FN[activation]
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: gated(activation, gate, up), (gate, up))


def kept_bytes(model):
    """Of the tensors kept for backward, each storage once."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.base_model(torch.arange(3, 67)[None]).last_hidden_state.sum()
    return sum(storages.values())


def test_one_wide_tensor_a_layer_less_is_kept():
    model = tiny_model("llama")
    before = kept_bytes(model)
    fuse_mlps(model)
    assert before - kept_bytes(model) == model.config.num_hidden_layers * 64 * model.config.intermediate_size * 4


class Gated(nn.Module):
    """As models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clamped(Gated):
    """Named like one, computed otherwise."""

    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(max=0.01))


class Routed(Gated):
    """Wants more than hidden states."""

    def forward(self, x, router):
        return super().forward(x) * router


@pytest.mark.parametrize(("kind", "fused"), [(Gated, 1), (Clamped, 0), (Routed, 0)])
def test_what_computes_something_else_is_left_alone(kind, fused):
    torch.manual_seed(0)
    module = nn.Sequential(kind())
    assert fuse_mlps(module) == fused
    assert ("forward" in vars(module[0])) == bool(fused)


def test_a_copy_uses_its_own_weights():
    module = nn.Sequential(Gated())
    fuse_mlps(module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[0].down_proj.weight.zero_()
        other[0].down_proj.bias.fill_(2.0)
    assert torch.equal(other(torch.randn(3, 4)), torch.full((3, 4), 2.0))
