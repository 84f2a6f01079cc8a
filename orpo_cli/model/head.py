"""Log-probs of targets straight from hidden states: no logits of a whole batch ever exist.

The loss touches the logits through one number a token, its target's log-prob. The vocabulary is walked in tiles that
stay in a cache, the softmax kept as a running maximum and sum. With the head frozen (LoRA), the gradient is known up
to a factor a token already in the forward pass, G = (onehot - softmax) W, and only G (M, E) is kept: two matrix
products, no recomputation. A trained head is walked again in backward, its own gradient made tile by tile.

Shapes: M predictions, E hidden size, V vocabulary, C rows and N words of a tile, R token rows trained by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Rows and words of a tile: on a CPU small enough for its caches, on a GPU large enough to keep it busy.
CPU_TILE, GPU_TILE = (512, 4096), (1024, 16384)
# Rows at a time of a head that is only known as a module; all their logits are alive at once.
CHUNK_ROWS = 256
_LOG2_E = math.log2(math.e)


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
        if type(self.module) is nn.Linear:
            weight, bias = self.module.weight, self.module.bias
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                return _TrainedHead.apply(hidden, targets, weight, bias, self)
            return _FrozenHead.apply(hidden, targets, weight, bias, [], None, self, torch.is_grad_enabled())
        if (trained := _trained_rows(self.module)) is not None:
            weight, rows, values = trained
            return _FrozenHead.apply(hidden, targets, weight, None, rows, values, self, torch.is_grad_enabled())
        return _recomputed(self.logits, hidden, targets)


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


def _trained_rows(module: nn.Module) -> tuple[Tensor, list[int], Tensor] | None:
    """Of a frozen head of which peft trains some token rows: weight (V, E), their ids and values (R, E); else None."""
    module = getattr(module, "token_adapter", module)  # peft wraps once more beside other adapters
    if not isinstance(module, TrainableTokensLayer) or type(module.base_layer) is not nn.Linear:
        return None
    adapters = module.active_adapters
    if module.base_layer.weight.requires_grad or module.merged or module.disable_adapters or len(adapters) != 1:
        return None
    # As peft computes it, a bias of the head takes no part.
    return module.base_layer.weight, module.token_indices[adapters[0]], module.trainable_tokens_delta[adapters[0]]


# ---- tiles ----


@dataclass(frozen=True)
class _Tile:
    """A run of words of the vocabulary."""

    first: int
    weight: Tensor  # (N, E)
    bias: Tensor | None  # (N,)
    hidden_columns: list[int]
    """Words of the run that are none: rows trained by themselves stand behind the vocabulary as words of their own."""

    def find(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (C, 1) of the words (C, 1), and which of them are this tile's."""
        column = words - self.first
        return column.clamp(0, len(self.weight) - 1), (column >= 0) & (column < len(self.weight))


class _Tiling:
    """The head's words cut into tiles, and the two buffers that every tile's logits are written into.

    Fresh buffers would cost as much time as the products.
    """

    def __init__(self, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.head, self.weight, self.bias = head, weight, bias
        rows, self.words = CPU_TILE if weight.device.type == "cpu" else GPU_TILE
        self.chunks = [slice(start, start + rows) for start in range(0, len(hidden), rows)]
        size = min(rows, len(hidden)) * min(self.words, len(weight))
        self.wide = torch.empty(size, dtype=torch.float32, device=weight.device)
        self.narrow = self.wide if weight.dtype == torch.float32 else torch.empty_like(self.wide, dtype=weight.dtype)

    def tiles(self, rows: Sequence[int] = (), values: Tensor | None = None) -> Iterator[_Tile]:
        """All tiles; the rows trained by themselves come last."""
        for first in range(0, len(self.weight), self.words):
            run = slice(first, min(first + self.words, len(self.weight)))
            hidden = [row - first for row in rows if run.start <= row < run.stop]
            yield _Tile(first, self.weight[run], None if self.bias is None else self.bias[run], hidden)
        if values is not None:
            for first in range(0, len(values), self.words):
                yield _Tile(len(self.weight) + first, values[first : first + self.words], None, [])

    def logits(self, hidden: Tensor, tile: _Tile) -> tuple[Tensor, Tensor | None]:
        """Logits (C, N) float32 of hidden (C, E), in the buffer, and the soft cap's slope at each of them."""
        shape = len(hidden), len(tile.weight)
        product, z = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (self.narrow, self.wide))
        torch.mm(hidden, tile.weight.t(), out=product)
        if product.dtype != z.dtype:
            z.copy_(product)
        if tile.bias is not None:
            z.add_(tile.bias)
        if self.head.scale != 1.0:
            z.mul_(self.head.scale)
        slope = None
        if self.head.cap is not None:
            z.div_(self.head.cap).tanh_()
            slope = 1 - z.square()
            z.mul_(self.head.cap)
        if tile.hidden_columns:
            z[:, tile.hidden_columns] = float("-inf")
        return z, slope

    def rounded(self, z: Tensor) -> Tensor:
        """A tile's (C, N) in the weights' dtype, for a product with them."""
        return z if z.dtype == self.weight.dtype else self.narrow[: z.numel()].view(z.shape).copy_(z)

    def slope_at(self, logits: Tensor) -> Tensor | float:
        """What scale and cap multiply a gradient by, where the logits are these."""
        return self.head.scale * (1.0 if self.head.cap is None else 1 - (logits / self.head.cap).square())


class _FrozenHead(torch.autograd.Function):
    """Log-probs of a head whose gradient is wanted for the hidden states, and for a few trained rows, alone."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, E)
        targets: Tensor,  # (M,)
        weight: Tensor,  # (V, E)
        bias: Tensor | None,  # (V,)
        rows: Sequence[int],  # R of them
        trained: Tensor | None,  # (R, E)
        head: Head,
        wants_gradient: bool,
    ) -> Tensor:
        tiling = _Tiling(head, hidden, weight, bias)
        values = None if trained is None else trained.to(weight.dtype)
        words = targets[:, None]  # (M, 1)
        for behind, row in enumerate(rows):
            words = torch.where(words == row, len(weight) + behind, words)
        # Of each prediction: the highest logit so far, the sum of exp(logit - highest), the target's logit, and the sum
        # of exp(logit - highest) W over all words but the target.
        highest, total, wanted, others = _running(hidden, wants_gradient)
        for tile in tiling.tiles(rows, values):
            for chunk in tiling.chunks:
                z, slope = tiling.logits(hidden[chunk], tile)
                column, inside = tile.find(words[chunk])
                shrink = _note(z, column, inside, highest[chunk], total[chunk], wanted[chunk])
                if wants_gradient:
                    z.scatter_(1, column, z.gather(1, column).masked_fill_(inside, 0.0))
                    if slope is not None:
                        z.mul_(slope)
                    others[chunk].mul_(shrink).add_(tiling.rounded(z) @ tile.weight)
        logps = wanted - highest - total.log()  # (M, 1)
        if not wants_gradient:
            return logps[:, 0]
        # onehot - softmax, the target's 1 - p taken before any rounding: at p near 1 it is all there is.
        of_target = -torch.expm1(logps) * tiling.slope_at(wanted)
        others.mul_(-head.scale / total)
        others.addcmul_(weight.index_select(0, targets), of_target)
        of_rows = None
        if trained is not None and values is not None:
            at_rows = head.scale * (hidden @ values.t()).float()  # (M, R)
            if head.cap is not None:
                at_rows = head.cap * torch.tanh(at_rows / head.cap)
            p = torch.exp(at_rows - highest - total.log())
            is_target = words == len(weight) + torch.arange(len(rows), device=words.device)
            of_rows = torch.where(is_target, of_target, -p * tiling.slope_at(at_rows))
            mended = values.float() - weight[rows].float()  # the targets above were taken from the old rows
            others += torch.where(is_target, of_target, 0.0) @ mended
        ctx.save_for_backward(others.to(hidden.dtype), of_rows, hidden if of_rows is not None else None)
        ctx.trained_dtype = None if trained is None else trained.dtype
        return logps[:, 0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_rows, hidden = ctx.saved_tensors
        scale = upstream[0][:, None]  # (M, 1) float32
        into_hidden = (gradient.float() * scale).to(gradient.dtype)
        into_trained = None
        if hidden is not None:
            into_trained = ((of_rows * scale).t() @ hidden.float()).to(ctx.trained_dtype)  # (R, E)
        return into_hidden, None, None, None, None, into_trained, None, None


class _TrainedHead(torch.autograd.Function):
    """Log-probs of a head that is trained itself: backward makes the logits again, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, E)
        targets: Tensor,  # (M,)
        weight: Tensor,  # (V, E)
        bias: Tensor | None,  # (V,)
        head: Head,
    ) -> Tensor:
        tiling = _Tiling(head, hidden, weight, bias)
        highest, total, wanted, _ = _running(hidden, wants_gradient=False)
        for tile in tiling.tiles():
            for chunk in tiling.chunks:
                z, _ = tiling.logits(hidden[chunk], tile)
                column, inside = tile.find(targets[chunk, None])
                _note(z, column, inside, highest[chunk], total[chunk], wanted[chunk])
        logps = (wanted - highest - total.log())[:, 0]
        ctx.save_for_backward(hidden, targets, weight, bias, highest + total.log(), logps)
        ctx.head = head
        return logps

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, weight, bias, log_total, logps = ctx.saved_tensors
        tiling = _Tiling(ctx.head, hidden, weight, bias)
        scale = upstream[0][:, None] * ctx.head.scale  # (M, 1)
        of_target = -torch.expm1(logps)[:, None]
        into_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        into_weight = torch.empty_like(weight)
        into_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for tile in tiling.tiles():
            run = slice(tile.first, tile.first + len(tile.weight))
            of_tile = torch.zeros(tile.weight.shape, dtype=torch.float32, device=weight.device)
            for chunk in tiling.chunks:
                z, slope = tiling.logits(hidden[chunk], tile)
                column, inside = tile.find(targets[chunk, None])
                _exp_(z.sub_(log_total[chunk])).neg_()
                z.scatter_(1, column, torch.where(inside, of_target[chunk], z.gather(1, column)))
                if slope is not None:
                    z.mul_(slope)
                z.mul_(scale[chunk])
                if into_bias is not None:
                    into_bias[run] += z.sum(0)
                of_logits = tiling.rounded(z)
                into_hidden[chunk] += of_logits @ tile.weight
                of_tile += of_logits.t() @ hidden[chunk]
            into_weight[run] = of_tile
        if into_bias is not None:
            into_bias = into_bias.to(bias.dtype)
        return into_hidden.to(hidden.dtype), None, into_weight, into_bias, None


def _running(hidden: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a walk over the vocabulary begins: highest, total and wanted (M, 1), others (M, E), all float32."""
    zeros = torch.zeros(3, len(hidden), 1, dtype=torch.float32, device=hidden.device)
    zeros[0] = torch.finfo(torch.float32).min
    others = torch.zeros(hidden.shape if wants_gradient else 0, dtype=torch.float32, device=hidden.device)
    return zeros[0], zeros[1], zeros[2], others


def _exp_(z: Tensor) -> Tensor:
    """exp(z) in place. On a CPU by exp2, which takes a third of the time where MKL, as on AMD's, is slow at exp."""
    return z.mul_(_LOG2_E).exp2_() if z.device.type == "cpu" else z.exp_()


def _note(z: Tensor, column: Tensor, inside: Tensor, highest: Tensor, total: Tensor, wanted: Tensor) -> Tensor:
    """Take a tile's logits z (C, N) into the running figures (C, 1), in place; z becomes exp(z - highest).

    Returns what earlier sums have been multiplied by, for the new highest logit.
    """
    wanted.copy_(torch.where(inside, z.gather(1, column), wanted))
    higher = torch.maximum(highest, z.amax(1, keepdim=True))
    shrink = (highest - higher).exp_()
    _exp_(z.sub_(higher))
    total.mul_(shrink).add_(z.sum(1, keepdim=True))
    highest.copy_(higher)
    return shrink
