"""Shared-prefix attention: every pair's prompt is attended to by both its branches and computed once.

A pair lies in the flat row as `shared | chosen | rejected` (data/batches.py). Two causal attentions make it whole:
shared + chosen over themselves, and rejected over shared + rejected (Wang, Hegde 2024, arXiv 2410.20305). On a GPU all
of a batch's are one call of a ragged kernel (attention_ragged.py). On a CPU, short ones are plain products, block by
block (attention_cpu.py). All others are computed branch by branch, by scaled_dot_product_attention.

The function is registered with transformers under NAME, with no mask function beside it: then no mask is built, and
the `layout` given to the model's forward reaches it in every layer, also under gradient checkpointing.

Shapes: T tokens, H query heads, G key/value heads, D head size; Q queries and K keys of one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from orpo_cli.data.batches import Segment
from orpo_cli.model import attention_cpu, attention_ragged

NAME = "orpo_shared_prefix"


class CannotShareError(Exception):
    """What a layer asks of its attention is more than this one computes; the text says what."""


class Layout:
    """Where the pairs of a flat row lie, with what attention derives from it: made once a batch, for all layers."""

    def __init__(self, segments: Sequence[Segment], device: torch.device, *, ragged: bool = True) -> None:
        """`ragged=False` leaves the ragged kernel out, where there is one."""
        self.segments = segments
        offered = ragged and attention_ragged.is_offered(device)
        self.ragged = attention_ragged.Ragged.of(segments, device) if offered else None
        self._blocks: dict[tuple[int | None, torch.dtype], list[attention_cpu.Block]] = {}
        self._visible: dict[tuple[int, int, int | None], Tensor] = {}

    def blocks(self, sliding_window: int | None, dtype: torch.dtype) -> list[attention_cpu.Block]:
        """The row cut for attention_cpu."""
        kind = (sliding_window, dtype)
        if kind not in self._blocks:
            self._blocks[kind] = attention_cpu.blocks_of(self.segments, sliding_window, dtype)
        return self._blocks[kind]

    def visible(self, queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
        """Which of K keys each of the last Q tokens sees, (Q, K) bool: those up to itself, within the window."""
        shape = (queries, keys, sliding_window)
        if shape not in self._visible:
            behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            seen = behind >= 0
            self._visible[shape] = seen if sliding_window is None else seen & (behind < sliding_window)
        return self._visible[shape]


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over one flat row: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D).

    `sliding_window` counts keys, the query's own included, as transformers does. Raises CannotShareError.
    """
    if attention_mask is not None:
        raise CannotShareError("it brings an attention mask of its own")
    if kwargs.get("softcap") is not None:
        raise CannotShareError("its attention logits are soft-capped")
    if kwargs.get("s_aux") is not None:
        raise CannotShareError("its attention has sinks")
    if layout.ragged is not None and not dropout and attention_ragged.takes(query, value):
        return layout.ragged.attention(query, key, value, scaling, sliding_window), None
    if not dropout and attention_cpu.takes(query, layout.segments):
        blocks = layout.blocks(sliding_window, query.dtype)
        return attention_cpu.attention(query, key, value, blocks, scaling), None
    return _branch_by_branch(query, key, value, layout, scaling, dropout, sliding_window), None


def _branch_by_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """As shared_prefix_attention, -> (1, T, H, D)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, Q, D) are the last Q of k's and v's (1, G, K, D) tokens."""
        queries, keys = q.shape[2], k.shape[2]
        masked = queries < keys or (sliding_window is not None and keys > sliding_window)
        shares_keys = q.shape[1] != k.shape[1]
        if masked and shares_keys and q.device.type == "cuda":
            # With a mask, sharing keys would send CUDA to the kernel that writes out all scores in float32.
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            shares_keys = False
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=layout.visible(queries, keys, sliding_window, q.device) if masked else None,
            dropout_p=dropout,
            is_causal=not masked,
            scale=scaling,
            enable_gqa=shares_keys,
        )

    # Split rather than sliced: the gradient of a slice is a zero-filled tensor of the whole row's size.
    sizes = [size for s in layout.segments for size in (s.shared + s.chosen, s.rejected)]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    outputs = []
    for i, segment in enumerate(layout.segments):
        chosen, rejected = 2 * i, 2 * i + 1
        outputs.append(attend(queries[chosen], keys[chosen], values[chosen]))
        outputs.append(
            attend(
                queries[rejected],
                torch.cat([keys[chosen][:, :, : segment.shared], keys[rejected]], dim=2),
                torch.cat([values[chosen][:, :, : segment.shared], values[rejected]], dim=2),
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


AttentionInterface.register(NAME, shared_prefix_attention)
