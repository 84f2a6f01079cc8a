"""Going on with a run: from which checkpoint, whether it still is the same run, and its state put back."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from orpo_cli.data.order import Position
from orpo_cli.errors import InputError
from orpo_cli.metrics import whole_rows
from orpo_cli.model.build import Built
from orpo_cli.recipe import Recipe, load_recipe
from orpo_cli.run_directory import RunDirectory, read_manifest
from orpo_cli.terminal import warn
from orpo_cli.train.checkpoint import check_sound, checkpoint_of, fault, load_checkpoint, newest_sound, read_state
from orpo_cli.train.evaluation import patience_is_over
from orpo_cli.train.state import Progress, Run

# What may change between a run and its resumption: it leaves the result as it is, or is meant to prolong the run. Where
# base and data lie, and by which name a template is called, may too: what counts is what is found there.
_FREE_KEYS = {
    "train": {"num_train_epochs", "max_steps", "max_tokens_per_microbatch", "logging_steps", "eval_steps", "save_steps"}
    | {"save_total_limit", "sample_prompts", "eval_on_start"},
    "model": {"gradient_checkpointing", "name_or_path", "revision", "chat_template"},
    "data": {"streaming", "strict", "max_dropped"},
    "output": {"dir", "merge", "trackers"},
}
# Libraries whose other version may give another result.
_DECIDING_VERSIONS = ("orpo", "torch", "transformers", "peft", "tokenizers", "bitsandbytes")
# What changes only rounding, if anything: it is told.
_NOTED = ("device", "device_type", "processes", "threads")


def find_checkpoint(directory: RunDirectory, named: Path | None) -> Path | None:
    """The checkpoint to go on from: the named one, else the newest sound one, None if there is none."""
    if named is not None:
        if not named.is_dir() or named.resolve().parent != directory.checkpoints.resolve():
            raise InputError(f"{named} is no checkpoint of this run", f"they lie in {directory.checkpoints}")
        check_sound(named)
        return named
    newest, damaged = newest_sound(directory.checkpoints)
    if newest is None and damaged:
        raise InputError(
            f"no checkpoint of {directory.path} is sound:\n" + "\n".join(f"  {line}" for line in damaged),
            "--overwrite begins anew in this directory, --output-dir in another; or put a copy of one back",
        )
    if newest is None and (directory.adapter.exists() or directory.merged.exists()):
        raise InputError(
            f"{directory.path} holds a trained model and no checkpoint to go on from",
            "--overwrite begins anew in this directory, --output-dir in another",
        )
    for line in damaged:
        warn(f"passed over a damaged checkpoint: {line}")
    return newest


def check_best(directory: RunDirectory, recipe: Recipe, checkpoint: Path) -> None:
    """Raise InputError where the run may have to end with the weights of a checkpoint that cannot be used any more.

    The best one of a checkpoint's time goes when a better one comes: it is missed by who goes back to before that.
    """
    best = read_state(checkpoint)["best_step"]
    if best is None or not recipe.train.load_best_model_at_end:
        return
    needed = checkpoint_of(directory.checkpoints, best)
    if (why := fault(needed)) is not None:
        raise InputError(
            f"the best checkpoint up to {checkpoint.name}, {needed}, cannot be used: {why}",
            "put a copy of it back, or name another one to go on from with --resume-from; or end with the last "
            "weights: --allow-changes --set train.load_best_model_at_end=false",
        )


def resumptions(
    directory: RunDirectory, recipe: Recipe, checkpoint: Path, record: dict[str, Any], *, allow: bool
) -> list[dict[str, Any]]:
    """What the manifest says of each time the run was gone on with, this one included: the step, and what differed.

    Raises InputError where something differs that may change the result, unless that is allowed.
    """
    state, lost = read_state(checkpoint), {}
    for path, length in ((directory.metrics, state["metrics_length"]), (directory.samples, state["samples_length"])):
        if (kept := whole_rows(path, length)) < length:
            lost[path.name] = {"before": f"{length:,} bytes", "now": f"{kept:,} of them"}
    entry = {"step": state["step"], **check_unchanged(directory, recipe, record, lost, allow=allow)}
    return [*read_manifest(directory).get("resumed", []), entry]


def identity(recipe: Recipe, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a run comes to, by dotted key; runs that agree in it are one."""
    tree = recipe.model_dump(mode="json")
    found: dict[str, Any] = {}
    for section, keys in tree.items():
        if section == "lora":
            found["lora"] = "all weights" if keys is None else "an adapter"
        for key in set(keys or ()) - _FREE_KEYS.get(section, set()):
            found[f"{section}.{key}"] = keys[key]
    of_manifest: Any = defaultdict(dict, manifest)
    for split in ("train", "eval"):
        if not isinstance(sources := found[f"data.{split}"], list):
            continue
        where = ("path", "revision")
        found[f"data.{split}"] = [{k: v for k, v in source.items() if k not in where} for source in sources]
        read = (of_manifest["data"].get(split) or {}).get("sources", [])
        found[f"data.{split} (content)"] = [source["fingerprint"] for source in read]
        if split == "train":
            found["data.train (streamed)"] = any(source["streamed"] for source in read)
    base = of_manifest["base"]
    found["model (content)"] = base.get("content") or f"{base.get('name_or_path')} {base.get('revision')}"
    found["tokenizer"] = of_manifest["fingerprints"].get("tokenizer")
    found["template"] = of_manifest["fingerprints"].get("template")
    quantised = recipe.model.load_in_4bit or recipe.model.load_in_8bit or recipe.train.optimizer != "adamw"
    for package in _DECIDING_VERSIONS:
        if package != "bitsandbytes" or quantised:  # a build for another device is named behind the plus
            found[f"versions.{package}"] = str(of_manifest["versions"].get(package)).partition("+")[0]
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What differs between two mappings, by key: the values before and now."""
    return {
        key: {"before": before.get(key), "now": now.get(key)}
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    }


def check_unchanged(
    directory: RunDirectory, recipe: Recipe, manifest: Mapping[str, Any], lost: Mapping[str, Any], *, allow: bool
) -> dict[str, Any]:
    """What differs from the run that is to be gone on with: `changed`, which may change the result, and `noted`.

    `manifest` is what would be written of the run as it is now; `lost` are differences found elsewhere. Raises
    InputError that lists all that is changed, unless it is allowed, and where there is no run.
    """
    if not directory.recipe.is_file():
        raise InputError(
            f"{directory.path} holds no run to go on with", "give the checkpoint's own run with --output-dir"
        )
    before = read_manifest(directory)
    own = load_recipe(directory.recipe)
    changed = {**differences(identity(own, before), identity(recipe, manifest)), **lost}
    if "lora" in changed:
        changed = {key: change for key, change in changed.items() if not key.startswith("lora.")}
    noted = differences({k: before.get(k) for k in _NOTED}, {k: manifest.get(k) for k in _NOTED})
    if changed and not allow:
        raise InputError(
            f"{directory.path} is not what it was; these differ:\n" + "\n".join(_told(changed)),
            "set or install what it was begun with (its recipe.yaml and manifest.json say what), begin a new run with "
            "--output-dir, or go on all the same with --resume --allow-changes",
        )
    for line in _told(changed):
        warn(f"going on although this differs:{line}")
    for line in _told(noted):
        warn(f"another machine or another number of threads or processes rounds otherwise:{line}")
    return {"changed": changed, "noted": noted}


def _told(changes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each change."""
    return [f"  {key}: {_short(of['before'])} before, now {_short(of['now'])}" for key, of in changes.items()]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def restore(run: Run, checkpoint: Path) -> None:
    """Put the run where a checkpoint left it. Raises InputError if that is damaged or of another model or recipe."""
    weights, optimizer_tensors, state = load_checkpoint(checkpoint)
    put_weights(weights, run.built, checkpoint)
    try:
        run.optimizer.load_tensors(optimizer_tensors)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{checkpoint} holds the state of another optimizer", "train.optimizer must be that of the run"
        ) from error
    run.progress = Progress(**{**state, "position": Position(**state["position"])})
    if run.progress.step > run.total_steps:
        raise InputError(
            f"{checkpoint} lies behind the recipe's {run.total_steps:,} steps",
            "raise train.max_steps or num_train_epochs, or name an earlier one with --resume-from",
        )
    if patience_is_over(run.progress, run.recipe):  # it had stopped early
        run.end_after(run.progress.step)
    if run.progress.loss_scale:
        run.scaler.load_state_dict(run.progress.loss_scale)


def put_weights(weights: dict[str, torch.Tensor], built: Built, checkpoint: Path) -> None:
    """Give the model the weights of a checkpoint. Raises InputError if they are those of another model."""
    adapted = isinstance(built.model, PeftModel)
    own = (
        get_peft_model_state_dict(built.model, save_embedding_layers=False)
        if adapted
        else dict(built.model.named_parameters())
    )
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in own.items()}:
        raise InputError(
            f"{checkpoint} holds other weights than are to be trained",
            "the recipe's base, lora section and template must be those of the run",
        )
    if adapted:
        set_peft_model_state_dict(built.model, weights)
    else:
        with torch.no_grad():
            for name, parameter in built.model.named_parameters():
                parameter.copy_(weights[name])
