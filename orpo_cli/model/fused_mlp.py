"""Gated MLPs that keep two wide tensors for backward where models, written out, keep three.

down(act(gate(x)) * up(x)), arXiv 2002.05202: what the activation gave is computed anew from its input, which is kept
anyway, for the price of one elementwise pass. (The product, a third or fourth one, is kept by the layer it goes into.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


def fuse_mlps(model: PreTrainedModel) -> int:
    """Replace the forward of every gated MLP that ours computes as well, in place; how many there were."""
    fused = 0
    for module in model.modules():
        if _is_gated(module):
            module.forward = MethodType(_forward, module)
            fused += 1
    return fused


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up, elementwise; all of one shape. Keeps gate and up for backward."""
    return _Gated.apply(activation, gate, up)


def _is_gated(module: nn.Module) -> bool:
    """Whether the module computes what `_forward` does: the same operations, so on a small input the same bits.

    Its projections, adapters or not, are called by either; tried are narrow ones in their place, so that a model
    without weights can be asked too.
    """
    if not all(isinstance(getattr(module, part, None), nn.Module) for part in _PARTS):
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trial: Any = copy.copy(module)
        trial._modules = {**module._modules, **{part: nn.Linear(8, 8, device="cpu") for part in _PARTS[:3]}}
        x = torch.linspace(-1, 1, 16, dtype=trial.gate_proj.weight.dtype).view(1, 2, 8)
        try:
            return torch.equal(trial(x), _forward(trial, x))
        except Exception:  # an MLP that wants more than hidden states is not ours to replace
            return False


def _forward(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(gated(module.act_fn, module.gate_proj(x), module.up_proj(x)))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.activation(gate)
        into_up = upstream[0] * active.detach()
        [into_gate] = torch.autograd.grad(active, gate, upstream[0] * up)
        return None, into_gate, into_up
