"""LoRA layers without overhead: base product and adapter in one autograd function, in the base's dtype.

peft widens activations to float32 for its adapters, which on a small model costs as much as the base itself. Here the
float32 weights stay the masters that are trained and saved, are rounded to the base's dtype where they are used, and
no intermediate but x A' is kept for backward. Layers that are more than plain (DoRA, dropout, ...) run through peft.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel


def fuse_lora(model: PreTrainedModel) -> int:
    """Replace the forward of every plain LoRA layer, in place; how many there were.

    Only the instances' forward changes: parameters, names, saving and merging stay peft's.
    """
    fused = 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and is_plain(layer):
            layer.forward = MethodType(_forward, layer)
            fused += 1
    return fused


def is_plain(layer: LoraLayer) -> bool:
    """Whether a layer computes x W' + bias + scaling * (x A') B' and nothing else, W dense or in 4 bits."""
    base = layer.get_base_layer()
    adapters = list(layer.lora_A)
    if len(adapters) != 1 or adapters != list(layer.active_adapters):
        return False
    [name] = adapters
    kind_is_known = (type(layer) is LoraLinear and type(base) is nn.Linear) or (
        type(layer).__name__ == type(base).__name__ == "Linear4bit"
    )
    return (
        kind_is_known
        and not base.weight.requires_grad
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in layer.lora_variant
        and not getattr(layer, "fan_in_fan_out", False)
        and layer.lora_B[name].bias is None
    )


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    [name] = layer.lora_A
    base = layer.get_base_layer()
    return _FusedLora.apply(
        x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    )


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) as it is multiplied; a 4-bit one is unpacked."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state).to(dtype)


class _FusedLora(torch.autograd.Function):
    """y = x W' + bias + scaling * (x A') B', with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., I)
        weight: Tensor,  # (O, I), or packed in 4 bits
        bias: Tensor | None,  # (O,)
        a: Tensor,  # (R, I) float32
        b: Tensor,  # (O, R) float32
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (T, I)
        dense = _dense(weight, x.dtype)
        y = torch.mm(rows, dense.t()) if bias is None else torch.addmm(bias.to(x.dtype), rows, dense.t())
        low = rows @ a.to(x.dtype).t()  # (T, R)
        y.addmm_(low, (b * scaling).to(x.dtype).t())
        ctx.save_for_backward(rows, low, a, b)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        dy = upstream[0].reshape(-1, upstream[0].shape[-1])  # (T, O)
        scaled_b = (b * ctx.scaling).to(dy.dtype)
        d_low = dy @ scaled_b  # (T, R)
        d_a = (d_low.t() @ rows).to(a.dtype)
        d_b = (dy.t() @ low).to(b.dtype) * ctx.scaling
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = dy @ _dense(ctx.weight, dy.dtype)
            d_x.addmm_(d_low, a.to(dy.dtype))
            d_x = d_x.view(ctx.shape)
        return d_x, None, None, d_a, d_b, None
