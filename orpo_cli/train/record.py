"""What a run says of itself before its first step: to who reads along, and in the manifest."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from orpo_cli import __version__
from orpo_cli.data.dataset import PairSet
from orpo_cli.inspect import pair_pieces
from orpo_cli.model.budget import Plan
from orpo_cli.model.build import Built, TextSide
from orpo_cli.model.load import base_content, base_revision
from orpo_cli.recipe import Recipe
from orpo_cli.recipe.checks import overruled
from orpo_cli.redact import redact
from orpo_cli.terminal import first_pair, say, size_of_set, warn
from orpo_cli.train.distributed import Processes
from orpo_cli.train.needs import in_words, savings
from orpo_cli.train.state import Run


def describe_data(train_set: PairSet, held_out: PairSet | None, text: TextSide, recipe: Recipe) -> None:
    """Say which pairs are used, which are not and why, and show the first one token by token."""
    for name, pairs in (("training", train_set), ("held-out", held_out)):
        if pairs is None:
            continue
        size, of_training = "a stream, not counted", name == "held-out" and train_set.held_out > 0
        if pairs.pairs is not None and pairs.rows is not None:
            size = size_of_set(pairs.pairs, pairs.rows, pairs.held_out, of_training=of_training)
        formats = ", ".join(dict.fromkeys(f"{s.format.name} ({s.format.why})" for s in pairs.reader.sources))
        say(f"{name} data: {size}; format {formats}")
        if pairs.truncated:
            say(f"  truncated {pairs.truncated:,} of them to fit (data.overlong: {recipe.data.overlong})")
        for line in pairs.drop_lines():
            say(f"  dropped {line}")
        if pairs.dropped_share > recipe.data.max_dropped / 10:
            warn(f"{pairs.dropped_share:.0%} of the rows were dropped; above {recipe.data.max_dropped:.0%} is an error")
    template = text.template
    say(f"template: {template.name}, a turn ends with {template.end_of_turn}")
    if text.added_tokens:
        say(f"  tokens added to the vocabulary: {' '.join(text.added_tokens)}")
    first_pair(pair_pieces(train_set.first(), text, recipe.loss.nll_tokens))


def describe_run(run: Run, plan: Plan) -> None:
    """Say what is trained, how, and in how many steps."""
    recipe, section, built = run.recipe, run.recipe.train, run.built
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    total = built.base.num_parameters()  # a 4-bit weight counts as what it stands for
    how = "full fine-tune" if recipe.lora is None else "LoRA"
    bits = "4-bit" if recipe.model.load_in_4bit else "8-bit" if recipe.model.load_in_8bit else str(built.base.dtype)[6:]
    say(
        f"model: {recipe.model.name_or_path}, {bits}, on {run.processes.device}; {how}, "
        f"{trained:,} of {total:,} parameters trained"
    )
    if built.trained_rows:
        say(f"  {len(built.trained_rows)} embedding rows are trained too; new or untrained ones start at the mean")
    if built.fitness.remark:
        say(f"  {built.fitness.remark}")
    say(
        f"training: {run.total_steps:,} steps of {section.batch_size} pairs, peak learning rate "
        f"{recipe.peak_learning_rate:.3g} ({section.lr_scheduler_type}), beta {recipe.loss.beta}, "
        f"NLL over {recipe.loss.nll_tokens} tokens, mean by {recipe.loss.nll_reduction}"
    )
    for line in overruled(recipe):
        say(f"  {line}")
    say(f"memory: {plan}")
    if not plan.fits:
        warn(f"this is more than the device has, by estimate; what would help: {in_words(savings(recipe))}")
    if run.progress.step:
        say(f"going on after step {run.progress.step}")


def facts(
    recipe: Recipe,
    command: Sequence[str],
    processes: Processes,
    text: TextSide,
    train_set: PairSet,
    held_out: PairSet | None,
) -> dict[str, Any]:
    """What the manifest says before the model is loaded: versions, device, command line, seed, base, data."""
    device = processes.device
    packages = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "tokenizers")
    return {
        "command": redact(shlex.join(command)),
        "versions": {"orpo": __version__, "python": platform.python_version()} | {p: version(p) for p in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or device.type,
        "device_type": device.type,
        "processes": processes.count,
        "threads": torch.get_num_threads(),
        "seed": recipe.train.seed,
        "base": {
            "name_or_path": recipe.model.name_or_path,
            "revision": base_revision(recipe.model),
            "content": base_content(recipe.model),
        },
        "fingerprints": text.fingerprints(),
        "template": {
            "name": text.template.name,
            "end_of_turn": text.template.end_of_turn,
            "added_tokens": text.added_tokens,
        },
        "learning_rate": recipe.peak_learning_rate,
        "data": {"train": train_set.summary(), "eval": held_out.summary() if held_out else None},
        "resumed": [],
    }


def of_model(record: dict[str, Any], built: Built, plan: Plan) -> dict[str, Any]:
    """What the manifest says besides when the model is loaded."""
    return {
        "base": record["base"] | {"dtype": str(built.base.dtype).removeprefix("torch.")},
        "template": record["template"] | {"trained_rows": built.trained_rows},
        "shared_prefix": built.fitness.not_shared is None,
        "max_tokens_per_microbatch": plan.max_tokens,
        "memory": plan.summary(),
    }
