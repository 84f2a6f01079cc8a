"""Micro-batches side by side on a CPU: a lane is a thread that computes its own with its share of the cores.

Between two products, a pass through a model prepares the next: operations are dispatched, memory is found, kernels are
made for new shapes. One thread does all that while the other cores wait, on two of them for a tenth of the time. In
lanes, one prepares while another computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from orpo_cli.model.fused_lora import is_plain

S = TypeVar("S")
T = TypeVar("T")

# With fewer tokens, a lane's products are too small to be worth it.
LANE_TOKENS = 512
# A lane has its own gradients: of no more than this share of all weights.
TRAINED_SHARE = 0.1


def lanes_for(max_tokens: int, cores: int) -> int:
    """Among how many lanes so many tokens at once are shared: one a core, if that leaves each enough."""
    return max(1, min(cores, max_tokens // LANE_TOKENS))


def trains_in_lanes(model: PreTrainedModel) -> bool:
    """Whether training may be computed in lanes: by plain adapters, few weights of them, and with nothing drawn.

    What a pass draws (dropout) comes from one random state, and would depend on which lane came first. Adapters of
    other kinds may change their module for the time of a pass: peft's of parameters do.
    """
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained = sum(n for n, is_trained in numbers if is_trained)
    return (
        trained <= TRAINED_SHARE * sum(n for n, _ in numbers)
        and all(is_plain(module) for module in model.modules() if isinstance(module, LoraLayer))
        and not _draws_at_random(model)
    )


def in_lanes(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """`work` of each item, all at the same time, in threads that share the cores evenly; a single one takes them all.

    Gradients are recorded as they are here. When all have ended, the first one's error, if there is any, is raised.
    """
    if len(items) < 2:
        return [work(item) for item in items]
    cores, records_gradients = torch.get_num_threads(), torch.is_grad_enabled()

    def in_lane(item: S) -> T:
        with torch.set_grad_enabled(records_gradients):  # each thread has a mode of its own
            return work(item)

    try:
        with ThreadPoolExecutor(len(items), "orpo-lane", torch.set_num_threads, (max(1, cores // len(items)),)) as pool:
            return list(pool.map(in_lane, items))
    finally:
        torch.set_num_threads(cores)  # for threads that begin from here on


def _draws_at_random(model: PreTrainedModel) -> bool:
    """Whether some module or some key of the configuration speaks of dropout or noise that is not zero."""
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    text = model.config.get_text_config().to_dict()
    return any(
        ("drop" in key or "jitter" in key or "noise" in key) and isinstance(value, float) and value > 0
        for key, value in text.items()
    )
