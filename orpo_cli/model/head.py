"""Log-probs of targets straight from hidden states: no logits of a whole batch ever exist.

The loss touches the logits through one number a token, its target's log-prob. With the head frozen (LoRA), its
gradient is therefore known up to a factor already in the forward pass, G = (onehot - softmax) W, and chunk by chunk
only G (M, E) is kept: two matrix products, no recomputation. With a trainable head, backward computes the chunks again.

Shapes: M predictions, E hidden size, V vocabulary, C rows of a chunk, R token rows that are trained by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Rows that go through the head at a time: bounds the logits alive to CHUNK_ROWS x V.
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Head:
    """What a family does between hidden states and probabilities: logits = cap(scale * (hidden W' + bias))."""

    module: nn.Module
    """The output embeddings, adapters in place if there are any."""
    scale: float = 1.0
    cap: float | None = None
    """Soft cap: cap * tanh(logits / cap)."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The model's head, with Cohere's and Granite's scale and Gemma's cap."""
        config = model.config
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, E), in float32."""
        logits = self.module(hidden).float() * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def target_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probs (M,) float32 of targets (M,) given hidden states (M, E)."""
        frozen = _frozen_weights(self.module)
        if frozen is None:
            return _recomputed(self.logits, hidden, targets)
        weight, bias, rows, trained = frozen
        return _FrozenHead.apply(hidden, targets, weight, bias, rows, trained, self, torch.is_grad_enabled())


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax of logits (M, V) at targets (M,), in float32 whatever the logits' dtype -> (M,)."""
    logits = logits.float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)


def _recomputed(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probs (M,) by chunks that backward computes again: right for whatever the head is made of."""

    def chunk_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return target_logps(logits_of(hidden), targets)

    chunks = []
    for rows, wanted in zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(chunk_logps, rows, wanted, use_reentrant=False))
        else:
            chunks.append(chunk_logps(rows, wanted))
    return torch.cat(chunks)


def _frozen_weights(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """Weight (V, E), bias (V,), ids (R,) and values (R, E) of rows trained by themselves; None for any other head."""
    if type(module) is nn.Linear:
        trainable = module.weight.requires_grad or (module.bias is not None and module.bias.requires_grad)
        return None if trainable else (module.weight, module.bias, None, None)
    module = getattr(module, "token_adapter", module)  # peft wraps once more beside other adapters
    if isinstance(module, TrainableTokensLayer) and type(module.base_layer) is nn.Linear:
        adapters = module.active_adapters
        if module.base_layer.weight.requires_grad or module.merged or module.disable_adapters or len(adapters) != 1:
            return None
        weight = module.base_layer.weight
        rows = torch.tensor(module.token_indices[adapters[0]], device=weight.device)
        # As peft computes it, a bias of the head takes no part.
        return weight, None, rows, module.trainable_tokens_delta[adapters[0]]
    return None


class _FrozenHead(torch.autograd.Function):
    """Log-probs of a head whose gradient is wanted for the hidden states, and for a few trained rows, alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, E)
        targets: Tensor,  # (M,)
        weight: Tensor,  # (V, E)
        bias: Tensor | None,  # (V,)
        rows: Tensor | None,  # (R,)
        trained: Tensor | None,  # (R, E)
        head: Head,
        wants_gradient: bool,
    ) -> Tensor:
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_gradient else None  # d logp / d hidden
        of_rows = torch.empty(len(hidden), 0 if rows is None else len(rows), dtype=hidden.dtype, device=hidden.device)
        values = None if trained is None else trained.to(weight.dtype)
        size = min(CHUNK_ROWS, len(hidden))
        # Two buffers for all chunks: fresh ones of this size cost as much time as the products.
        products = torch.empty(size, len(weight), dtype=weight.dtype, device=weight.device)
        wide = products if weight.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            h, target = hidden[chunk], targets[chunk, None]  # (C, E), (C, 1)
            product, z = products[: len(h)], wide[: len(h)]  # (C, V)
            torch.mm(h, weight.t(), out=product)
            if rows is not None and values is not None:
                product[:, rows] = h @ values.t()
            if product is not z:
                z.copy_(product)
            if bias is not None:
                z.add_(bias)
            if head.scale != 1.0:
                z.mul_(head.scale)
            slope = None
            if head.cap is not None:
                z.div_(head.cap).tanh_()
                slope = (1 - z.square()) if wants_gradient else None  # of the cap, at each logit
                z.mul_(head.cap)
            highest = z.amax(1, keepdim=True)
            wanted = z.gather(1, target)
            z.sub_(highest).exp_()
            total = z.sum(1, keepdim=True)
            logp = wanted - highest - total.log()  # (C, 1)
            logps[chunk] = logp[:, 0]
            if gradient is None:
                continue
            # onehot - softmax, with 1 - p taken before any rounding: at p near 1 it is all there is.
            z.div_(-total).scatter_(1, target, -torch.expm1(logp))
            if slope is not None:
                z.mul_(slope)
            if head.scale != 1.0:
                z.mul_(head.scale)
            if product is not z:
                product.copy_(z)
            if rows is not None and values is not None:
                of_rows[chunk] = product[:, rows]
                product[:, rows] = 0
                torch.addmm(of_rows[chunk] @ values, product, weight, out=gradient[chunk])
            else:
                torch.mm(product, weight, out=gradient[chunk])
        ctx.save_for_backward(gradient, of_rows, hidden if rows is not None else None)
        ctx.trained_dtype = None if trained is None else trained.dtype
        return logps

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_rows, hidden = ctx.saved_tensors
        scale = upstream[0][:, None]  # (M, 1) float32
        into_hidden = (gradient.float() * scale).to(gradient.dtype)
        into_trained = None
        if hidden is not None:
            into_trained = ((of_rows.float() * scale).t() @ hidden.float()).to(ctx.trained_dtype)  # (R, E)
        return into_hidden, None, None, None, None, into_trained, None, None
