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
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from orpo_cli.model.fused_lora import is_plain
from orpo_cli.model.logprobs import PairLogprobs

S = TypeVar("S")
T = TypeVar("T")

# A lane's tokens; with half of them, its products are so much slower that little is gained.
LANE_TOKENS = 1024
# A lane has its own gradients: of no more than this share of all weights.
TRAINED_SHARE = 0.1


def lanes_for(max_tokens: int, most: int) -> int:
    """Among how many lanes so many tokens at once are shared, `most` at most."""
    return max(1, min(most, max_tokens // LANE_TOKENS))


def most_lanes(logprobs: PairLogprobs) -> int:
    """How many lanes training may use at most: one a core. One in all where several processes share the cores already.

    So too where a lane would not be by itself. What a pass draws at random (dropout) comes from one random state;
    frequencies that depend on a batch (those of models that share no prefixes) lie in the model; and adapters that are
    more than plain may change their module for the time of a pass: peft's of parameters do.
    """
    model = logprobs.model
    in_group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    fit = logprobs.shares_prefix and all(map(is_plain, adapters)) and not _draws_at_random(model)
    return (
        torch.get_num_threads() if model.device.type == "cpu" and not in_group and fit and _trains_little(model) else 1
    )


def in_lanes(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """`work` of each item, all at the same time, in threads that share the cores evenly; the results in their order.

    When all have ended, the first one's error, if there is any, is raised.
    """
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(items), "orpo-lane", torch.set_num_threads, (max(1, cores // len(items)),)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(cores)  # a thread sets its own number, but that of all later threads besides


def _trains_little(model: PreTrainedModel) -> bool:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained <= TRAINED_SHARE * sum(p.numel() for p in model.parameters())


def _draws_at_random(model: PreTrainedModel) -> bool:
    """Whether some module or some key of the configuration speaks of dropout or noise that is not zero."""
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    text = model.config.get_text_config().to_dict()
    return any(
        ("drop" in key or "jitter" in key or "noise" in key) and isinstance(value, float) and value > 0
        for key, value in text.items()
    )
