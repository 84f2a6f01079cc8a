"""RMS norms in fewer passes against the families' own modules: values, gradients, and what is left alone."""

import copy

import pytest
import torch
from torch import nn

from orpo_cli.model.fused_norm import fuse_norms, rms_norm
from tests.tiny import random_pairs, tiny_model

# Each family's norms in a model of two layers; a layer norm is none.
NORMS = {
    "llama": 5,
    "qwen3": 9,
    "mistral": 5,
    "gemma2": 9,
    "gemma3_text": 13,
    "olmo2": 9,
    "phi3": 5,
    "gpt2": 0,
    "cohere": 0,
}


def loss_and_gradients(model):
    ids = torch.from_numpy(random_pairs(1)[0].chosen_ids)[None]
    hidden = model.base_model(ids).last_hidden_state
    loss = (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum()
    model.zero_grad()
    loss.backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", NORMS)
def test_values_and_gradients_are_the_familys_own(family):
    model = tiny_model(family)
    expected, expected_gradients = loss_and_gradients(model)
    assert fuse_norms(model) == NORMS[family]
    got, gradients = loss_and_gradients(model)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() <= 1e-4 * expected_gradients[name].norm() + 1e-7, name


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_are_those_of_the_formula_in_float64(offset):
    x = torch.randn(3, 2, 7).double().requires_grad_()
    weight = torch.randn(7).double().requires_grad_()

    def plain(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * (weight + offset)

    upstream = torch.randn(3, 2, 7)
    expected = torch.autograd.grad((plain(x, weight) * upstream).sum(), [x, weight])
    single = [x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    got = torch.autograd.grad((rms_norm(*single, 0.1, offset) * upstream).sum(), single)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_float32_as_the_familys_own():
    model = tiny_model("llama")
    exact, exact_gradients = loss_and_gradients(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    stock, stock_gradients = loss_and_gradients(half)
    assert fuse_norms(half) == 5
    fused, gradients = loss_and_gradients(half)
    assert fused.dtype == torch.bfloat16
    assert (fused - exact).norm() < 1.2 * (stock - exact).norm()
    for name, gradient in gradients.items():
        wanted = exact_gradients[name]
        assert (gradient - wanted).norm() < 1.5 * (stock_gradients[name] - wanted).norm() + 0.02 * wanted.norm(), name


class HalfRMSNorm(nn.Module):
    """Named like one, computed otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x):
        return x * (x.abs().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class WrongEpsRMSNorm(HalfRMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, 1e-5)


class InputScaledRMSNorm(HalfRMSNorm):
    """The same as long as all weights are equal, as they are before training."""

    def forward(self, x):
        return rms_norm(x * self.weight, torch.ones(8), self.eps)


@pytest.mark.parametrize("kind", [HalfRMSNorm, WrongEpsRMSNorm, InputScaledRMSNorm])
def test_a_norm_that_computes_something_else_is_left_alone(kind):
    module = nn.Sequential(kind())
    assert fuse_norms(module) == 0
    assert "forward" not in vars(module[0])


def test_a_copy_of_a_fused_norm_uses_its_own_weight():
    model = tiny_model("llama")
    fuse_norms(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.fill_(2.0)
    x = torch.randn(1, 3, 32)
    torch.testing.assert_close(other.model.norm(x), 2 * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())
