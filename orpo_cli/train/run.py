"""`orpo train`: prepare data and model, run the loop, save, evaluate, merge, say what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from orpo_cli.errors import InputError, RunError, is_out_of_memory
from orpo_cli.files import require_space, to_json, write_file
from orpo_cli.generate import answers
from orpo_cli.malloc import keep_freed_memory
from orpo_cli.metrics import MetricsFile, read_metrics
from orpo_cli.model.build import Built, build_for_training
from orpo_cli.model.lora import save_adapter
from orpo_cli.model.memory import checkpoint_layers, device_memory, process_memory
from orpo_cli.recipe import Recipe, dump_recipe
from orpo_cli.report.trackers import told_to_trackers
from orpo_cli.run import RunDirectory
from orpo_cli.signals import Noted, last_words
from orpo_cli.terminal import mute, say
from orpo_cli.train.checkpoint import give_up_later, recover_checkpoints, save_checkpoint
from orpo_cli.train.diagnosis import Health
from orpo_cli.train.distributed import Processes, make_deterministic, seed_everything
from orpo_cli.train.evaluation import patience_is_over, score_together
from orpo_cli.train.finish import finish, load_best
from orpo_cli.train.inputs import load_inputs
from orpo_cli.train.loop import train_steps
from orpo_cli.train.needs import checkpoint_bytes, final_bytes, needs_of, plan_memory
from orpo_cli.train.optimizer import Optimizer
from orpo_cli.train.record import describe_data, describe_run, facts, of_model
from orpo_cli.train.rehearsal import rehearse
from orpo_cli.train.resume import check_best, day_begun, find_checkpoint, on_day, restore, resumptions
from orpo_cli.train.state import Progress, Run


@dataclass(frozen=True)
class Start:
    """How a run is to be started, as the command line says."""

    resume: bool = False
    resume_from: Path | None = None
    allow_changes: bool = False
    """Go on although something differs that may change the result."""
    overwrite: bool = False
    command: tuple[str, ...] = ()


def train(recipe: Recipe, start: Start | None = None) -> dict[str, Any]:
    """Train as the recipe says and write the run directory; the held-out figures, empty without a held-out set.

    Raises InputError kinds for what is the user's to mend, RunError for a run gone bad, Stopped after a signal.
    """
    start = start or Start()
    processes = Processes()
    mute(not processes.is_main)
    run = RunDirectory(Path(recipe.output.dir))
    resumes = start.resume or start.resume_from is not None
    if start.allow_changes and not resumes:
        raise InputError("--allow-changes says how to go on with a run", "give --resume or --resume-from too")
    with run.claimed(resume=resumes, overwrite=start.overwrite) if processes.is_main else nullcontext():
        if processes.is_main:
            recover_checkpoints(run.checkpoints)
        processes.wait()
        return train_in(run, recipe, start, processes)


def train_in(run: RunDirectory, recipe: Recipe, start: Start, processes: Processes) -> dict[str, Any]:
    """Train in a directory that is this run's alone; as `train`."""
    make_deterministic(processes.device)
    if processes.device.type == "cpu":
        keep_freed_memory()

    resumes = start.resume or start.resume_from is not None
    recipe = on_day(recipe, day_begun(run) if resumes else None)
    text, train_set, held_out = load_inputs(recipe, processes.device, say)
    recipe = on_day(recipe, text.template.day)
    describe_data(train_set, held_out, text, recipe)
    record = facts(recipe, start.command, processes, text, train_set, held_out)
    checkpoint = find_checkpoint(run, start.resume_from) if resumes else None
    if checkpoint is not None:
        record["resumed"] = resumptions(run, recipe, checkpoint, record, allow=start.allow_changes)
        check_best(run, recipe, checkpoint)

    seed_everything(recipe.train.seed)
    beside = process_memory(processes.device)
    built = build_for_training(recipe, text, processes.device)
    optimizer = Optimizer(built.model.named_parameters(), recipe.train)
    progress, total_steps = Progress(), train_set.total_steps(recipe.train)
    if checkpoint is not None:
        progress = restore(checkpoint, built, optimizer)
        if progress.step > total_steps:
            raise InputError(
                f"{checkpoint} lies behind the recipe's {total_steps:,} steps",
                "raise train.max_steps or num_train_epochs, or name an earlier one with --resume-from",
            )
        if patience_is_over(progress, recipe):  # it had stopped early
            total_steps = progress.step
    available = -processes.largest(-device_memory(processes.device))  # the smallest of all processes' devices
    needs = needs_of(recipe, built, train_set)
    plan = dataclasses.replace(plan_memory(recipe, needs, progress, processes.device, available), process=beside)
    progress.max_tokens, progress.checkpointed_layers = plan.max_tokens, plan.checkpointed_layers
    checkpoint_layers(built.base, plan.checkpointed_layers)
    record |= of_model(record, built, plan) | {"steps": total_steps}
    if processes.is_main:
        parts = [checkpoint_bytes(recipe, built, optimizer), final_bytes(recipe, built)]
        needed = sum(parts) if checkpoint is None else max(parts)  # the next checkpoint takes the place of an old one
        require_space(run.path, needed, "the run", given_up=run.parts() if start.overwrite else ())
        if start.overwrite:
            run.clear()
        if checkpoint is not None:
            # Before anything says that the run goes on from here, and before metrics.jsonl is cut back to here: a kill
            # must not leave a later checkpoint that --resume would take together with what is not its own.
            give_up_later(run.checkpoints, progress.step)
        write_file(run.manifest, to_json(record))  # first: it says if the recipe is another than before
        write_file(run.recipe, dump_recipe(recipe))

    scaler = torch.amp.GradScaler(processes.device.type, enabled=built.base.dtype == torch.float16)
    if progress.loss_scale:
        scaler.load_state_dict(progress.loss_scale)
    loop = Run(
        recipe=recipe,
        processes=processes,
        logprobs=built.logprobs,
        optimizer=optimizer,
        scaler=scaler,
        train_set=train_set,
        held_out=held_out.in_source_order() if held_out else [],
        total_steps=total_steps,
        max_tokens=plan.max_tokens,
        progress=progress,
        metrics=MetricsFile(run.metrics, progress.metrics_length) if processes.is_main else None,
        samples=MetricsFile(run.samples, progress.samples_length)
        if processes.is_main and recipe.train.sample_prompts
        else None,
        answer=lambda prompts: answers(built.base, text, prompts, system=recipe.data.system),
        without_adapter=built.model.disable_adapter if isinstance(built.model, PeftModel) else None,
        save=lambda: save(run, recipe, built, optimizer, progress) if processes.is_main else None,
        health=Health(recipe.loss.beta, total_steps),
    )
    if loop.metrics is not None:  # on the disk the file is as long now as it was at the checkpoint
        for row in read_metrics(run.metrics):
            loop.health.see(row)
    describe_run(loop, built, plan)
    words = "--resume goes on from the newest checkpoint, if there is one"
    trackers = told_to_trackers(loop.metrics, recipe, run.trackers)
    with out_of_memory_explained(loop), files_closed(loop), last_words(words), trackers:
        rehearse(loop)
        train_steps(loop)
        record["weights_of_step"] = load_best(run, loop, built)
        if loop.held_out and loop.last_scores is None:  # resumed after its last step, or with other weights than those
            loop.last_scores = score_together(loop, Noted())
        figures = finish(run, loop, text, built, held_out, record) if processes.is_main else {}
    processes.close()
    return figures


@contextmanager
def files_closed(run: Run) -> Iterator[None]:
    """Close what the loop appends to, however it ends."""
    try:
        yield
    finally:
        for file in (run.metrics, run.samples):
            if file is not None:
                file.close()


@contextmanager
def out_of_memory_explained(run: Run) -> Iterator[None]:
    """Say what to change when memory runs out in the loop."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory with {run.max_tokens:,} tokens at once; the last checkpoint is sound",
            "these change nothing but rounding, so that --resume goes on: a lower train.max_tokens_per_microbatch "
            "(down to the longest pair), model.gradient_checkpointing: true",
        ) from error


def save(run: RunDirectory, recipe: Recipe, built: Built, optimizer: Optimizer, progress: Progress) -> None:
    """Write the checkpoint of this step."""

    def write_weights(directory: Path) -> None:
        if isinstance(built.model, PeftModel):
            save_adapter(built.model, directory, base=recipe.model.name_or_path, revision=recipe.model.revision)
        else:
            save_file({n: p.detach() for n, p in built.model.named_parameters()}, directory / "model.safetensors")

    require_space(
        run.checkpoints, checkpoint_bytes(recipe, built, optimizer), f"the checkpoint of step {progress.step}"
    )
    save_checkpoint(
        run.checkpoints,
        progress.step,
        write_weights=write_weights,
        optimizer=optimizer.tensors(),
        state=dataclasses.asdict(progress),
        keep=recipe.train.save_total_limit,
        protect=progress.best_step,
    )
