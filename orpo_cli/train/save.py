"""The checkpoint of a run: what it takes of the disk, and what is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from peft import PeftModel
from safetensors.torch import save_file

from orpo_cli.files import require_space
from orpo_cli.model.build import Built
from orpo_cli.model.lora import save_adapter
from orpo_cli.recipe import Recipe
from orpo_cli.train.checkpoint import save_checkpoint
from orpo_cli.train.optimizer import Optimizer
from orpo_cli.train.state import Run


def checkpoint_bytes(recipe: Recipe, built: Built, optimizer: Optimizer) -> int:
    """What a checkpoint takes at least."""
    parameters = [p for p in built.model.parameters() if p.requires_grad or recipe.lora is None]
    state = sum(tensor.nbytes for tensor in optimizer.tensors().values())
    # Before the first step there are no moments yet: two for each number, of four bytes or of one.
    moments = sum(p.numel() for p in parameters if p.requires_grad) * (8 if recipe.train.optimizer == "adamw" else 2)
    return sum(p.nbytes for p in parameters) + max(state, moments)


def save(run: Run) -> None:
    """Write the checkpoint of this step."""
    model, base, progress = run.built.model, run.recipe.model, run.progress

    def write_weights(directory: Path) -> None:
        if isinstance(model, PeftModel):
            save_adapter(model, directory, base=base.name_or_path, revision=base.revision)
        else:
            save_file({n: p.detach() for n, p in model.named_parameters()}, directory / "model.safetensors")

    needed = checkpoint_bytes(run.recipe, run.built, run.optimizer)
    require_space(run.directory.checkpoints, needed, f"the checkpoint of step {progress.step}")
    save_checkpoint(
        run.directory.checkpoints,
        progress.step,
        write_weights=write_weights,
        optimizer=run.optimizer.tensors(),
        state=dataclasses.asdict(progress),
        keep=run.recipe.train.save_total_limit,
        protect=progress.best_step,
    )
