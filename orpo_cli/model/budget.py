"""The token budget and the checkpointed layers with which a model fits its device's memory and a step takes least time.

Nothing here asks what is free at the moment, so that the same recipe on the same device always gets the same answer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from orpo_cli.model.device import GIB, device_memory
from orpo_cli.model.lanes import lanes_for
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.memory import Memory, Needs
from orpo_cli.recipe import Recipe

# By device: the token budget beyond which a step gains little, and how many tokens' time a micro-batch costs by itself.
# Measured on two CPU cores with Llamas of width 576, in lanes and not. Estimated for the others.
FAST_TOKENS = {"cpu": (2048, 128), "cuda": (16384, 512), "mps": (4096, 256)}
# By device, as many as a pass without gradients computes at once.
SCORING_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 16384}


@dataclass(frozen=True)
class Plan:
    """How a run uses its device."""

    max_tokens: int
    """Flat tokens computed at once."""
    checkpointed_layers: int
    layers: int
    memory: Memory
    available: int
    process: int = 0
    """Bytes of the process beside the model, as process_memory says; `available` leaves room for them."""

    @property
    def peak(self) -> int:
        """Bytes that the run's metrics will show as its peak: on a CPU those of the whole process."""
        return self.memory.total + self.process

    @property
    def fits(self) -> bool:
        """Whether the device has what is needed, by estimate."""
        return self.memory.total <= self.available

    @property
    def is_roomy(self) -> bool:
        """Whether it has twice that."""
        return 2 * self.memory.total <= self.available

    def summary(self) -> dict[str, Any]:
        """What the manifest says of it: bytes by part."""
        return {
            "checkpointed_layers": self.checkpointed_layers,
            "estimated_bytes": {**asdict(self.memory), "process": self.process, "total": self.peak},
            "available_bytes": self.available,
        }

    def __str__(self) -> str:
        process = f", and {self.process / GIB:.2f} for Python, libraries and data" if self.process else ""
        return (
            f"{self.max_tokens:,} tokens at once, {self.checkpointed_layers} of {self.layers} layers checkpointed; "
            f"{self.memory.total / GIB:.2f} GiB estimated of {self.available / GIB:.2f} available{process}"
        )


def choose_plan(
    needs: Needs,
    device: torch.device,
    available: int,
    *,
    longest_pair: int,
    pairs: int,
    recomputed: float,
    max_tokens: int | None = None,
    checkpointed_layers: int | None = None,
) -> Plan:
    """The plan with which a step takes the least time, among those that fit.

    A step's time is taken to be (1 + overhead / max_tokens) * (1 + recomputed * share of checkpointed layers): a small
    budget costs something in every micro-batch, a checkpointed layer its forward pass again; all of them together the
    share `recomputed` of a whole step. Where nothing fits, the plan that needs least: one pair at a time and layers
    checkpointed. The longest pair, `longest_pair` tokens, always has to fit: beyond the budget it goes by itself. What
    is given is taken as it is. `pairs` are those of a step.
    """
    fast, overhead = FAST_TOKENS.get(device.type, FAST_TOKENS["cuda"])
    halved = [fast // 2**i for i in range(fast.bit_length()) if fast // 2**i > longest_pair]
    # A pair that is longer than the budget is a micro-batch of its own.
    budgets = [*halved, min(fast, longest_pair)] if max_tokens is None else [max_tokens]
    counts = range(needs.layers + 1) if checkpointed_layers is None else [checkpointed_layers]
    step = pairs * longest_pair
    plans = [
        Plan(
            tokens,
            count,
            needs.layers,
            needs.training(min(max(tokens, longest_pair), step), count, lanes_for(tokens, needs.most_lanes)),
            available,
        )
        for tokens in budgets
        for count in counts
    ]

    def time(plan: Plan) -> float:
        share = plan.checkpointed_layers / max(1, plan.layers)
        return (1 + overhead / plan.max_tokens) * (1 + recomputed * share)

    return min((plan for plan in plans if plan.fits), key=time, default=min(plans, key=lambda plan: plan.memory.total))


def scoring_tokens(logprobs: PairLogprobs, recipe: Recipe) -> int:
    """The token budget of a pass without gradients: the recipe's; for `auto` up to SCORING_TOKENS."""
    if recipe.train.max_tokens_per_microbatch != "auto":
        return recipe.train.max_tokens_per_microbatch
    device, longest = logprobs.model.device, 2 * recipe.data.max_length
    needs, available = Needs.of(logprobs, recipe.data.max_length, None), device_memory(device)
    most = SCORING_TOKENS.get(device.type, SCORING_TOKENS["cuda"])
    budgets = [tokens for tokens in (most, most // 2, most // 4, most // 8, most // 16) if tokens > longest]
    return next((tokens for tokens in budgets if needs.scoring(tokens).total <= available), longest)
