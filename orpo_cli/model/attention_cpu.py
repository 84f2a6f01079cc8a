"""Shared-prefix attention of a flat row on a CPU, by batched products over blocks of queries.

scaled_dot_product_attention has a kernel that is made for long sequences. On those of pairs it takes two to five times
as long, forward and backward, as products and a softmax written out, the heads that share a key head folded into one.

Shapes: T tokens, H query heads, G key/value heads, D head size; Q queries and K keys of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo_cli.data.batches import Segment

# With branches of up to this many tokens, products are faster than the kernel; one longer one sends its row there.
LONGEST = 2048
# Tokens of a block, about. Its keys end with its last token: in one block, half of a branch's products would be wasted.
BLOCK = 128
# A pair of up to so many tokens is one block all the same: two branches' many small products would take longer.
PAIR = 256


@dataclass(frozen=True)
class Block:
    """Neighbouring queries of one pair, and all keys that one of them sees."""

    queries: slice
    keys: Sequence[slice]
    """One run of tokens; two for a rejected branch, which continues the shared tokens."""
    unseen: Tensor
    """(Q, N), of the last N keys: -inf where a query does not see a key, 0 where it does. Those before, all see."""


def takes(query: Tensor, segments: Sequence[Segment]) -> bool:
    """Whether `attention` is for queries (1, H, T, D) of such pairs."""
    longest = max(s.shared + max(s.chosen, s.rejected) for s in segments)
    return query.device.type == "cpu" and longest <= LONGEST


def blocks_of(segments: Sequence[Segment], sliding_window: int | None, dtype: torch.dtype) -> list[Block]:
    """The blocks that all pairs of a flat row are cut into, for scores of this dtype."""
    blocks = []
    for s in segments:
        chosen, rejected = s.start + s.shared, s.start + s.shared + s.chosen
        cuts: list[tuple[slice, list[slice]]] = []
        if s.stop - s.start <= PAIR:
            cuts.append((slice(s.start, s.stop), [slice(s.start, s.stop)]))
        else:
            shared = slice(s.start, chosen)
            cuts += [(part, [slice(s.start, part.stop)]) for part in _cut(s.start, rejected)]
            cuts += [(part, [shared, slice(rejected, part.stop)]) for part in _cut(rejected, s.stop)]
        for queries, keys in cuts:
            blocks.append(Block(queries, keys, _unseen(s, queries, keys, sliding_window, dtype)))
    return blocks


def attention(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scaling: float | None) -> Tensor:
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D).

    Keeps them, and of each block the probabilities, (H, Q, K).
    """
    return _Blocks.apply(query, key, value, blocks, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _cut(start: int, stop: int) -> list[slice]:
    """Parts of about BLOCK tokens each, all but the last one of the same size."""
    size = -(-(stop - start) // max(1, round((stop - start) / BLOCK)))
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _unseen(
    segment: Segment, queries: slice, keys: Sequence[slice], sliding_window: int | None, dtype: torch.dtype
) -> Tensor:
    chosen, rejected = segment.start + segment.shared, segment.start + segment.shared + segment.chosen
    q = np.arange(queries.start, queries.stop)[:, None]
    k = np.concatenate([np.arange(run.start, run.stop) for run in keys])
    unseen = (k > q) | ((q >= rejected) & (chosen <= k) & (k < rejected))
    if sliding_window is not None:
        apart = q - k - segment.chosen * ((q >= rejected) & (k < chosen))
        unseen |= apart >= sliding_window
    unseen = unseen[:, unseen.any(0).argmax() :]
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(torch.from_numpy(unseen), float("-inf"))


class _Blocks(torch.autograd.Function):
    """One function for the whole row: hundreds of small steps of autograd's own would take longer than some products.

    Each block is copied out, so that its products find rows one behind the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # (1, H, T, D)
        key: Tensor,  # (1, G, T, D)
        value: Tensor,  # (1, G, T, D)
        blocks: Sequence[Block],
        scaling: float,
    ) -> Tensor:
        heads, tokens = query.shape[1:3]
        output = value.new_empty(1, tokens, heads, value.shape[-1])
        kept = []
        for block in blocks:
            q, k, v = _copied(block, query, key, value, scaling)
            scores = torch.bmm(q, k.transpose(1, 2))  # (G, H / G * Q, K)
            scores.view(heads, -1, k.shape[1])[..., -block.unseen.shape[1] :].add_(block.unseen)
            p = scores.softmax(-1)
            output[0, block.queries] = torch.bmm(p, v).view(heads, -1, v.shape[-1]).transpose(0, 1)
            if any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scaling = blocks, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *probabilities = ctx.saved_tensors
        d_output = upstream[0][0].transpose(0, 1)  # (H, T, D)
        d_query, d_key, d_value = (_zeros_like(x) for x in (query, key, value))
        for block, p in zip(ctx.blocks, probabilities, strict=True):
            q, k, v = _copied(block, query, key, value, ctx.scaling)
            d_out = d_output[:, block.queries].reshape(len(v), -1, v.shape[-1])  # (G, H / G * Q, D)
            d_p = torch.bmm(d_out, v.transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
            d_q = torch.bmm(d_scores, k).view(query.shape[1], -1, q.shape[-1])
            torch.mul(d_q, ctx.scaling, out=d_query[0, :, block.queries])
            _scatter(torch.bmm(d_scores.transpose(1, 2), q), d_key[0], block.keys)
            _scatter(torch.bmm(p.transpose(1, 2), d_out), d_value[0], block.keys)
        return d_query, d_key, d_value, None, None


def _zeros_like(tensor: Tensor) -> Tensor:
    """Zeros (1, H, T, D) that lie token by token in memory, as what comes out of a projection does."""
    batch, heads, tokens, size = tensor.shape
    return tensor.new_zeros(batch, tokens, heads, size).transpose(1, 2)


def _copied(block: Block, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """A block's scaled queries, (G, H / G * Q, D), its keys and its values, (G, K, D)."""
    q = query[0, :, block.queries]
    q = torch.mul(q, scaling, out=q.new_empty(q.shape)).view(key.shape[1], -1, q.shape[-1])
    return q, _gather(key[0], block.keys), _gather(value[0], block.keys)


def _gather(tensor: Tensor, runs: Sequence[slice]) -> Tensor:
    """The runs of tokens of a (G, T, D), one behind the other: (G, K, D)."""
    return torch.cat([tensor[:, run] for run in runs], dim=1)


def _scatter(gathered: Tensor, into: Tensor, runs: Sequence[slice]) -> None:
    """Add (G, K, D) to the runs of a (G, T, D) that it was gathered from."""
    parts = gathered.split([run.stop - run.start for run in runs], dim=1)
    for run, part in zip(runs, parts, strict=True):
        into[:, run] += part
