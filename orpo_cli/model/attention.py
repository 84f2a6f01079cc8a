"""Shared-prefix attention: every pair's prompt is attended to by both its branches and computed once.

A pair lies in the flat row as `shared | chosen | rejected` (data/batches.py). Two ragged causal attentions make it
whole: shared + chosen over themselves, and rejected over shared + rejected (Wang, Hegde 2024, arXiv 2410.20305).
The function is registered with transformers under NAME, with no mask function beside it: then no mask is built, and
the `segments` given to the model's forward reach it in every layer, also under gradient checkpointing.

Shapes: T tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from orpo_cli.data.batches import Segment

NAME = "orpo_shared_prefix"


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over one flat row: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D).

    `sliding_window` counts keys, the query's own included, as transformers does.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("soft-capped attention and attention sinks have no shared-prefix kernel")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, Q, D) are the last Q of k's and v's (1, G, K, D) tokens."""
        queries, keys = q.shape[2], k.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < keys else None
        mask = None
        if window is not None or queries < keys:
            behind = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    # Split rather than sliced: the gradient of a slice is a zero-filled tensor of the whole row's size.
    sizes = [size for s in segments for size in (s.shared + s.chosen, s.rejected)]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    outputs = []
    for i, segment in enumerate(segments):
        chosen, rejected = 2 * i, 2 * i + 1
        outputs.append(attend(queries[chosen], keys[chosen], values[chosen]))
        outputs.append(
            attend(
                queries[rejected],
                torch.cat([keys[chosen][:, :, : segment.shared], keys[rejected]], dim=2),
                torch.cat([values[chosen][:, :, : segment.shared], values[rejected]], dim=2),
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)
