"""`orpo check`: what a recipe comes to before it is run: model, data, memory by part, disk, and on demand time."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from orpo_cli.data.dataset import PairSet
from orpo_cli.errors import RunError
from orpo_cli.malloc import keep_freed_memory
from orpo_cli.merge import merged_bytes
from orpo_cli.model.budget import Plan
from orpo_cli.model.build import TextSide, build_for_training
from orpo_cli.model.checkpointing import checkpoint_layers
from orpo_cli.model.device import GIB, device_memory, process_memory
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.memory import Needs
from orpo_cli.model.outline import outline, packed
from orpo_cli.recipe import Recipe
from orpo_cli.recipe.checks import overruled
from orpo_cli.run_directory import RunDirectory
from orpo_cli.signals import Noted
from orpo_cli.terminal import size_of_set
from orpo_cli.train.distributed import Processes, make_deterministic, seed_everything
from orpo_cli.train.evaluation import evaluation_steps, score_together
from orpo_cli.train.inputs import load_inputs
from orpo_cli.train.loop import gradients_within_memory, steps_to_come
from orpo_cli.train.needs import final_bytes, in_words, needs_of, plan_memory, savings
from orpo_cli.train.optimizer import Optimizer, learning_rate
from orpo_cli.train.rehearsal import rehearse
from orpo_cli.train.save import checkpoint_bytes
from orpo_cli.train.state import Progress, Run

# Steps that are timed; the first ones are slower than all others.
_TIMED_STEPS = 3


def check(recipe: Recipe, *, probe: bool = False) -> dict[str, Any]:
    """What the recipe comes to on this machine, as JSON holds it. Loads no weights, unless it is to time some steps.

    Raises InputError kinds as `orpo train` does, as far as it can be told.
    """
    processes = Processes()
    device = processes.device
    text, train_set, held_out = load_inputs(recipe, device)
    available = device_memory(device)
    figures, plan = _planned(recipe, text, train_set, held_out, device, available, process_memory(device))
    figures["too_large"] = too_large = list(_too_large(figures["memory"], figures["disk"], device))
    figures["fits"] = not too_large
    if too_large:
        changes = {} if plan.fits else _remedy(recipe, text, train_set, device, available)
        if changes is not None and "merging" in too_large and recipe.lora is not None:
            changes["output.merge"] = False
        figures["would_fit"] = changes or None
    if probe:
        figures["time"] = time_steps(recipe, text, train_set, held_out, processes, plan)
    return figures


def _planned(
    recipe: Recipe,
    text: TextSide,
    train_set: PairSet,
    held_out: PairSet | None,
    device: torch.device,
    available: int,
    process: int,
) -> tuple[dict[str, Any], Plan]:
    with outline(recipe, text, device) as built:
        needs = needs_of(recipe, built, train_set)
        needs = replace(needs, fixed=packed(needs.fixed, built.base, recipe.model))
        plan = replace(plan_memory(recipe, needs, Progress(), device, available), process=process)
        optimizer = Optimizer(built.model.named_parameters(), recipe.train)
        checkpoints = recipe.train.save_total_limit + (held_out is not None)
        whole = merged_bytes(built.base)
        figures = {
            "device": str(device),
            "model": {
                "parameters": built.base.num_parameters(),
                "trained": sum(p.numel() for p in built.model.parameters() if p.requires_grad),
                "dtype": str(built.base.dtype).removeprefix("torch."),
                "shared_prefix": built.fitness.not_shared is None,
            },
            "data": {
                name: _of_pairs(built.logprobs, pairs)
                for name, pairs in (("train", train_set), ("eval", held_out))
                if pairs is not None
            },
            "steps": train_set.total_steps(recipe.train),
            "tokens": _tokens_of_run(built.logprobs, train_set, recipe),
            "max_tokens_per_microbatch": plan.max_tokens,
            "checkpointed_layers": plan.checkpointed_layers,
            "layers": plan.layers,
            "memory": {
                "available": available,
                "training": _by_part(plan),
                "evaluation": _of_evaluation(built.logprobs, needs, plan, held_out),
                "merging": _of_merging(recipe, needs, plan, whole, device),
            },
            "disk": {
                "directory": recipe.output.dir,
                "checkpoints": checkpoints * checkpoint_bytes(recipe, built, optimizer),
                "results": final_bytes(recipe, built),
                "download": 0 if Path(recipe.model.name_or_path).is_dir() else whole,
                "free": shutil.disk_usage(_existing(Path(recipe.output.dir))).free,
            },
        }
    return figures, plan


def _of_pairs(logprobs: PairLogprobs, pairs: PairSet) -> dict[str, Any]:
    """Counts of a set; None where a stream has not been counted.

    `tokens` are as they are computed, a shared prompt once; `longest_pair` is as data.max_length counts, the prompt and
    the longer answer.
    """
    held = None if pairs.held is None else list(pairs.held.values())
    return {
        "rows": pairs.rows,
        "pairs": pairs.pairs,
        "held_out": pairs.held_out,
        "dropped": dict(sorted(pairs.dropped.items())),
        "truncated": pairs.truncated,
        "tokens": None if held is None else sum(map(logprobs.tokens, held)),
        "longest_pair": None if held is None else max(max(len(p.chosen_ids), len(p.rejected_ids)) for p in held),
    }


def _tokens_of_run(logprobs: PairLogprobs, train_set: PairSet, recipe: Recipe) -> int | None:
    if not train_set.held:
        return None
    section = recipe.train
    pairs = train_set.total_pairs(section) or train_set.total_steps(section) * section.batch_size
    mean = statistics.fmean(logprobs.tokens(pair) for pair in train_set.held.values())
    return round(pairs * mean)


def _by_part(plan: Plan) -> dict[str, int]:
    return {**asdict(plan.memory), "process": plan.process, "total": plan.peak}


def _of_evaluation(logprobs: PairLogprobs, needs: Needs, plan: Plan, held_out: PairSet | None) -> dict[str, int] | None:
    """Within the run: what is there for training stays, but for gradients."""
    if held_out is None or not held_out.held:
        return None
    tokens = [logprobs.tokens(pair) for pair in held_out.held.values()]
    at_once = min(max(max(tokens), plan.max_tokens), sum(tokens))
    scoring = replace(needs.scoring(at_once), gradients=0)
    return _by_part(replace(plan, memory=scoring))


def _of_merging(recipe: Recipe, needs: Needs, plan: Plan, whole: int, device: torch.device) -> dict[str, int] | None:
    """Bytes on the device and on the host at the end of the run.

    Weights are merged where they lie, and written from the host. Onto a quantised base nothing is merged: the whole one
    is loaded beside it, on the host.
    """
    if recipe.lora is not None and not recipe.output.merge:
        return None
    there = replace(needs.fixed, gradients=0, backward=0).total
    if device.type != "cpu":
        return {"device": there, "host": plan.process + whole}
    quantised = recipe.model.load_in_4bit or recipe.model.load_in_8bit
    # What training has freed stays with the process (malloc.py); the whole base comes beside it.
    total = plan.peak + whole if quantised else plan.process + there
    return {"device": total, "host": total}


def _too_large(memory: dict[str, Any], disk: dict[str, Any], device: torch.device) -> Iterator[str]:
    """What takes more than there is. What is available to a CPU is so beside what the process takes by itself."""
    for name in ("training", "evaluation"):
        if (parts := memory[name]) and parts["total"] - parts["process"] > memory["available"]:
            yield name
    if parts := memory["merging"]:
        process = memory["training"]["process"]
        on_device, on_host = parts["device"] - process * (device.type == "cpu"), parts["host"] - process
        if on_device > memory["available"] or on_host > device_memory(torch.device("cpu")):
            yield "merging"
    if disk["checkpoints"] + disk["results"] > disk["free"]:
        yield "disk"


def _existing(path: Path) -> Path:
    return next(directory for directory in (path, *path.absolute().parents) if directory.is_dir())


def _remedy(
    recipe: Recipe, text: TextSide, train_set: PairSet, device: torch.device, available: int
) -> dict[str, Any] | None:
    """The changes, the cheapest first, with which the run fits; None if none of ours makes it fit."""
    changes: dict[str, Any] = {}
    for key, value in _cheapest_first(recipe):
        changes[key] = value
        changed = _changed(recipe, changes)
        with outline(changed, text, device) as built:
            needs = needs_of(changed, built, train_set)
            needs = replace(
                needs,
                fixed=packed(needs.fixed, built.base, changed.model),
                longest_pair=min(needs.longest_pair, 2 * changed.data.max_length),
            )
            if plan_memory(changed, needs, Progress(), device, available).fits:
                return changes
    return None


def _cheapest_first(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    yield from savings(recipe).items()
    length = recipe.data.max_length // 4
    while length >= 128:
        yield "data.max_length", length
        length //= 2


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    tree = recipe.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return Recipe.model_validate(tree)


# ---- time, on demand ----


def time_steps(
    recipe: Recipe, text: TextSide, train_set: PairSet, held_out: PairSet | None, processes: Processes, plan: Plan
) -> dict[str, float]:
    """Load the model, take a few steps and forget them: seconds of the longest micro-batches, of a step, of the run."""
    make_deterministic(processes.device)
    if processes.device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.train.seed)
    built = build_for_training(recipe, text, processes.device)
    checkpoint_layers(built.base, plan.checkpointed_layers)
    run = Run(recipe, RunDirectory(Path(recipe.output.dir)), processes, text, built, train_set, held_out)
    run.progress.max_tokens = plan.max_tokens
    started = time.perf_counter()
    rehearse(run)
    longest = time.perf_counter() - started
    seconds = []
    for step, data in zip(range(1, _TIMED_STEPS + 1), steps_to_come(run), strict=False):
        started = time.perf_counter()
        gradients_within_memory(run, step, data)
        run.optimizer.gradients()
        run.optimizer.clip().item()
        run.optimizer.step(learning_rate(step, run.total_steps, recipe.train, peak=recipe.peak_learning_rate))
        seconds.append(time.perf_counter() - started)
    evaluation = 0.0
    if run.held_out:
        some = run.held_out[:: max(1, len(run.held_out) // 64)]  # enough to tell
        started = time.perf_counter()
        score_together(run, some, Noted())
        evaluation = (time.perf_counter() - started) * len(run.held_out) / len(some)
    typical = statistics.median(seconds)
    whole = run.total_steps * typical + len(evaluation_steps(run)) * evaluation
    return {"longest_micro_batches": longest, "step": typical, "evaluation": evaluation, "run": whole}


# ---- for people ----


def lines(recipe: Recipe, figures: dict[str, Any]) -> Iterator[str]:
    """The plan in words."""
    model, data, memory, disk = (figures[key] for key in ("model", "data", "memory", "disk"))
    bits = " in 4 bits" if recipe.model.load_in_4bit else " in 8 bits" if recipe.model.load_in_8bit else ""
    how = "full fine-tune" if recipe.lora is None else "LoRA"
    yield f"model: {model['parameters']:,} parameters, {model['dtype']}{bits}; {how}, {model['trained']:,} trained"
    for name, said in (("train", "training"), ("eval", "held-out")):
        if name in data:
            of = data[name]
            if of["pairs"] is None:
                yield f"{said} data: a stream, not counted"
                continue
            longest = (
                f"; {of['tokens']:,} tokens to compute; prompt + longer answer at most {of['longest_pair']:,}"
                if of["tokens"]
                else ""
            )
            dropped = "".join(f", {count:,} {reason}" for reason, count in of["dropped"].items())
            of_training = name == "eval" and data["train"]["held_out"] > 0
            size = size_of_set(of["pairs"], of["rows"], of["held_out"], of_training=of_training)
            yield f"{said} data: {size}{dropped}{longest}"
    tokens = f", about {figures['tokens']:,} tokens" if figures["tokens"] else ""
    yield f"steps: {figures['steps']:,} of {recipe.train.batch_size} pairs{tokens}"
    yield from overruled(recipe)
    yield (
        f"micro-batches: {figures['max_tokens_per_microbatch']:,} tokens, "
        f"{figures['checkpointed_layers']} of {figures['layers']} layers checkpointed"
    )
    for name in ("training", "evaluation"):
        if parts := memory[name]:
            shown = ", ".join(
                f"{part} {_gib(size)}" for part, size in parts.items() if size >= GIB / 200 and part != "total"
            )
            yield f"memory, {name}: {_gib(parts['total'])} GiB ({shown})"
    if parts := memory["merging"]:
        beside = "" if figures["device"] == "cpu" else f" on the device, {_gib(parts['host'])} on the host"
        yield f"memory, merging: {_gib(parts['device'])} GiB{beside}"
    beside = f", beside the process's {_gib(memory['training']['process'])}" if figures["device"] == "cpu" else ""
    yield f"available on {figures['device']}: {_gib(memory['available'])} GiB{beside}"
    download = f", base {_gib(disk['download'])} unless it is there" if disk["download"] else ""
    yield (
        f"disk: checkpoints {_gib(disk['checkpoints'])} GiB, results {_gib(disk['results'])}{download}; "
        f"free {_gib(disk['free'])}"
    )
    if took := figures.get("time"):
        yield (
            f"time: {_duration(took['run'])}; a step {took['step']:.2g} s, an evaluation {took['evaluation']:.2g} s, "
            f"the longest micro-batches {took['longest_micro_batches']:.2g} s"
        )


def require_fit(figures: dict[str, Any]) -> None:
    """Raise RunError where the plan does not fit, with the change that would make it."""
    if figures["fits"]:
        return
    memory, disk = figures["memory"], figures["disk"]
    told = []
    for name in figures["too_large"]:
        if name == "disk":
            needed, there = disk["checkpoints"] + disk["results"], f"free in {disk['directory']}"
            told.append(f"the run's files take {_gib(needed)} GiB, and {_gib(disk['free'])} are {there}")
        else:
            parts, process = memory[name], memory["training"]["process"]
            needed = parts.get("total", parts.get("host")) - process
            told.append(f"{name} takes {_gib(needed)} GiB, and {_gib(memory['available'])} are available")
    remedy = figures["would_fit"]
    hint = f"it would fit with {in_words(remedy)}" if remedy else "it takes a smaller model or a larger device"
    if figures["too_large"] == ["disk"]:
        hint = "make room, keep fewer checkpoints (train.save_total_limit), or name another place with --output-dir"
    raise RunError(f"does not fit: {'; '.join(told)}", hint)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
