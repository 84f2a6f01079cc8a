"""What a run takes of memory and of the disk, and what to change where that is too much."""

from __future__ import annotations

import json
from typing import Any

import torch

from orpo_cli.data.dataset import PairSet
from orpo_cli.errors import ModelError
from orpo_cli.merge import merged_bytes
from orpo_cli.model.budget import Plan, choose_plan
from orpo_cli.model.build import Built
from orpo_cli.model.memory import Needs
from orpo_cli.recipe import Recipe
from orpo_cli.train.rehearsal import longest_pairs
from orpo_cli.train.state import Progress


def needs_of(recipe: Recipe, built: Built, train_set: PairSet) -> Needs:
    """What training takes with pairs as long as the set's longest."""
    longest = longest_pairs(built.logprobs, train_set, recipe.data.max_length)[0]
    side = max(len(longest.chosen_ids), len(longest.rejected_ids))
    return Needs.of(built.logprobs, side, recipe.train.optimizer, longest_pair=built.logprobs.tokens(longest))


def plan_memory(recipe: Recipe, needs: Needs, progress: Progress, device: torch.device, available: int) -> Plan:
    """How the run uses its device: as the recipe says; for `auto` as the run has gone so far, else as it fits."""
    budget, checkpointing = recipe.train.max_tokens_per_microbatch, recipe.model.gradient_checkpointing
    layers = progress.checkpointed_layers if checkpointing == "auto" else needs.layers if checkpointing else 0
    if checkpointing is True and not needs.layers:
        raise ModelError(
            f"{recipe.model.name_or_path} has no layers that could be checkpointed",
            "set model.gradient_checkpointing: auto",
        )
    return choose_plan(
        needs,
        device,
        available,
        longest_pair=needs.longest_pair,
        pairs=recipe.train.batch_size,
        # Forward and backward take the same time, the weights' gradients as much again.
        recomputed=1 / 3 if recipe.lora is None else 1 / 2,
        max_tokens=progress.max_tokens if budget == "auto" else budget,
        checkpointed_layers=layers,
    )


def savings(recipe: Recipe) -> dict[str, Any]:
    """Keys and values that need less memory than the recipe's, the cheapest first."""
    found: dict[str, Any] = {}
    if recipe.train.max_tokens_per_microbatch != "auto":
        found["train.max_tokens_per_microbatch"] = "auto"
    if recipe.model.gradient_checkpointing is False:
        found["model.gradient_checkpointing"] = "auto"
    if recipe.lora is None:
        if recipe.train.optimizer == "adamw":
            found["train.optimizer"] = "adamw_8bit"
        found["lora"] = {}
    if not (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        found["model.load_in_4bit"] = True
    return found | {"data.max_length": recipe.data.max_length // 2}


def in_words(changes: dict[str, Any]) -> str:
    """Changes as a person would write them into a recipe."""
    return ", ".join(
        "an adapter instead of all weights (without lora: null)" if key == "lora" else f"{key}: {json.dumps(value)}"
        for key, value in changes.items()
    ).replace('"', "")


def final_bytes(recipe: Recipe, built: Built) -> int:
    """What is written after the last step takes at least."""
    adapter = 0 if recipe.lora is None else sum(p.nbytes for p in built.model.parameters() if p.requires_grad)
    return adapter + (merged_bytes(built.base) if recipe.lora is None or recipe.output.merge else 0)
