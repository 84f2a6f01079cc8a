"""Attention of a whole flat row in one call of torch's ragged FlashAttention, for half precision on CUDA.

The 2P branches of P pairs are 2P sequences: chosen, with shared + chosen as queries and keys, and rejected, with
rejected as queries and shared + rejected as keys. In this order their queries are the flat row as it lies; their keys
are gathered, the shared ones twice. The kernel aligns queries with the last keys of their sequence, which makes both
kinds causal; model/probe.py tries that on the machine at hand before it is used.

Shapes: T tokens, S = 2P sequences, N gathered keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from orpo_cli.data.batches import Segment

# torch 2.11 has no enable_gqa: there the kernel shares key heads without being told.
_PARAMETERS = inspect.signature(varlen_attn).parameters
_SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _PARAMETERS else {}


def is_offered(device: torch.device) -> bool:
    """Whether torch has the kernel, with windows, for this device: CUDA from compute capability 8.0 (Ampere) on."""
    return device.type == "cuda" and "window_size" in _PARAMETERS and torch.cuda.get_device_capability(device) >= (8, 0)


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes tensors (1, heads, T, D) like these."""
    size = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and size == value.shape[-1] and size % 8 == 0 and size <= 256


@dataclass(frozen=True)
class Ragged:
    """The sequences of one flat row."""

    keys: Tensor  # (N,) int64, where in the flat row each gathered key lies
    query_starts: Tensor  # (S + 1,) int32, of each sequence in the flat row, and the end
    key_starts: Tensor  # (S + 1,) int32, of each sequence in the gathered keys, and the end
    longest_queries: int
    longest_keys: int

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> Ragged:
        """The sequences of a flat row that consists of these segments."""
        keys, query_lengths, key_lengths = [], [], []
        for segment in segments:
            shared = np.arange(segment.start, segment.start + segment.shared)
            branch = segment.stop - segment.rejected
            chosen, rejected = np.arange(segment.start + segment.shared, branch), np.arange(branch, segment.stop)
            keys += [shared, chosen, shared, rejected]
            query_lengths += [len(shared) + len(chosen), len(rejected)]
            key_lengths += [len(shared) + len(chosen), len(shared) + len(rejected)]
        return cls(
            keys=_on(device, np.concatenate(keys).astype(np.int64)),
            query_starts=_on(device, np.cumsum([0, *query_lengths], dtype=np.int32)),
            key_starts=_on(device, np.cumsum([0, *key_lengths], dtype=np.int32)),
            longest_queries=max(query_lengths),
            longest_keys=max(key_lengths),
        )

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
    ) -> Tensor:
        """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        attended = varlen_attn(
            q,
            k.index_select(0, self.keys),
            v.index_select(0, self.keys),
            self.query_starts,
            self.key_starts,
            self.longest_queries,
            self.longest_keys,
            scale=scaling,
            # Counts the keys before the query's own, and none after it. Unbounded is -1.
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            **(_SHARED_KEYS if q.shape[1] != k.shape[1] else {}),
        )
        assert isinstance(attended, Tensor)  # with no auxiliary output asked for
        return attended[None]


def _on(device: torch.device, indices: np.ndarray) -> Tensor:
    """Indices on the device, copied without waiting for what it has still to do."""
    tensor = torch.from_numpy(indices)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
