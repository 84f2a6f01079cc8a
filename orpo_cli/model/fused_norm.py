"""RMS norms in fewer passes: one autograd function that keeps its input and one number a token for backward.

Written out, as models have it, the norm makes several float32 copies of the hidden states and keeps some for backward:
on a CPU it takes about twice the time, and several times the memory.

Shapes: E the size that is normalised over.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def fuse_norms(model: PreTrainedModel) -> int:
    """Replace the forward of every RMS norm that ours computes as well, in place; how many there were."""
    fused = 0
    for module in model.modules():
        if (offset := _offset(module)) is not None:
            module.forward = MethodType(_FORWARD[offset], module)
            fused += 1
    return fused


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), computed in float32, over the last dimension (arXiv 1910.07467).

    x (..., E) and weight (E,) -> (..., E) of x's dtype.
    """
    return _RmsNorm.apply(x, weight, eps, offset)


def _offset(module: nn.Module) -> float | None:
    """What the module adds to its weight (Gemma: 1); None if it is no RMS norm, or another one."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight, eps = module.weight, _eps(module)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    # A small input, so that eps binds; unequal weights, at which an offset shows, and what they are multiplied with.
    generator = torch.Generator().manual_seed(0)
    x = 1e-3 * torch.randn(4, len(weight), generator=generator).to(weight.dtype)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    with torch.no_grad():
        try:
            trial: Any = copy.deepcopy(module)
            trial = trial.to_empty(device="cpu") if weight.is_meta else trial.cpu()
            weight = trial.weight.copy_(0.5 + torch.rand(len(weight), generator=generator))
            expected = trial(x)
        except Exception:  # a norm that wants more than hidden states is not ours to replace
            return None
        for offset in (0.0, 1.0):
            if expected.dtype == x.dtype and torch.allclose(
                rms_norm(x, weight, eps, offset), expected, rtol=tolerance, atol=1e-6
            ):
                return offset
    return None


def _eps(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


_FORWARD = {
    0.0: lambda module, x: rms_norm(x, module.weight, _eps(module)),
    1.0: lambda module, x: rms_norm(x, module.weight, _eps(module), 1.0),
}


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (wide * scale if wide is x else wide.mul_(scale)).mul_(weight.float() + offset).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        into_weight = None
        if ctx.needs_input_grad[1]:
            into_weight = (upstream[0].float() * normed).flatten(0, -2).sum(0).to(weight.dtype)
        of_normed = upstream[0].float() * (weight.float() + ctx.offset)
        along = torch.linalg.vecdot(of_normed, normed)[..., None].div_(x.shape[-1])
        return of_normed.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), into_weight, None, None
