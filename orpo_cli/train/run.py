"""`orpo train`: prepare data and model, run the loop, save, evaluate, merge, say what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_cli.errors import InputError, RunError, is_out_of_memory
from orpo_cli.files import require_space, to_json, write_file
from orpo_cli.malloc import keep_freed_memory
from orpo_cli.metrics import MetricsFile, read_metrics
from orpo_cli.model.budget import Plan
from orpo_cli.model.build import build_for_training
from orpo_cli.model.checkpointing import checkpoint_layers
from orpo_cli.model.device import device_memory, process_memory
from orpo_cli.recipe import Recipe, dump_recipe
from orpo_cli.report.trackers import told_to_trackers
from orpo_cli.run_directory import RunDirectory, day_of
from orpo_cli.signals import Noted, last_words
from orpo_cli.terminal import mute, say
from orpo_cli.train.checkpoint import give_up_later, recover_checkpoints
from orpo_cli.train.distributed import Processes, make_deterministic, seed_everything
from orpo_cli.train.evaluation import score_together
from orpo_cli.train.finish import finish, load_best
from orpo_cli.train.inputs import load_inputs
from orpo_cli.train.loop import train_steps
from orpo_cli.train.needs import final_bytes, needs_of, plan_memory
from orpo_cli.train.record import describe_data, describe_run, facts, of_model
from orpo_cli.train.rehearsal import rehearse
from orpo_cli.train.resume import check_best, find_checkpoint, restore, resumptions
from orpo_cli.train.save import checkpoint_bytes
from orpo_cli.train.state import Run


@dataclass(frozen=True)
class Start:
    """How a run is to be started, as the command line says."""

    resume: bool = False
    resume_from: Path | None = None
    allow_changes: bool = False
    """Go on although something differs that may change the result."""
    overwrite: bool = False
    command: tuple[str, ...] = ()

    @property
    def resumes(self) -> bool:
        """Whether a run is to be gone on with, if there is one."""
        return self.resume or self.resume_from is not None


def train(recipe: Recipe, start: Start | None = None) -> dict[str, Any]:
    """Train as the recipe says and write the run directory; the held-out figures, empty without a held-out set.

    Raises InputError kinds for what is the user's to mend, RunError for a run gone bad, Stopped after a signal.
    """
    start = start or Start()
    processes = Processes()
    mute(not processes.is_main)
    directory = RunDirectory(Path(recipe.output.dir))
    if start.allow_changes and not start.resumes:
        raise InputError("--allow-changes says how to go on with a run", "give --resume or --resume-from too")
    claimed = directory.claimed(resume=start.resumes, overwrite=start.overwrite)
    with claimed if processes.is_main else nullcontext():
        if processes.is_main:
            recover_checkpoints(directory.checkpoints)
        processes.wait()
        return train_in(directory, recipe, start, processes)


def train_in(directory: RunDirectory, recipe: Recipe, start: Start, processes: Processes) -> dict[str, Any]:
    """Train in a directory that is this run's alone; as `train`."""
    make_deterministic(processes.device)
    if processes.device.type == "cpu":
        keep_freed_memory()

    recipe = recipe.on_day(day_of(directory) if start.resumes else None)
    text, train_set, held_out = load_inputs(recipe, processes.device, say)
    recipe = recipe.on_day(text.template.day)
    describe_data(train_set, held_out, text, recipe)
    record = facts(recipe, start.command, processes, text, train_set, held_out)
    checkpoint = find_checkpoint(directory, start.resume_from) if start.resumes else None
    if checkpoint is not None:
        record["resumed"] = resumptions(directory, recipe, checkpoint, record, allow=start.allow_changes)
        check_best(directory, recipe, checkpoint)

    seed_everything(recipe.train.seed)
    beside = process_memory(processes.device)
    built = build_for_training(recipe, text, processes.device)
    run = Run(recipe, directory, processes, text, built, train_set, held_out)
    if checkpoint is not None:
        restore(run, checkpoint)
    plan = settle_memory(run, beside)
    record |= of_model(record, built, plan) | {"steps": run.total_steps}
    if processes.is_main:
        begin(run, record, resumes=checkpoint is not None, overwrite=start.overwrite)
    describe_run(run, plan)

    words = "--resume goes on from the newest checkpoint, if there is one"
    trackers = told_to_trackers(run.metrics, recipe, directory.trackers)
    with out_of_memory_explained(run), files_closed(run), last_words(words), trackers:
        # On a CPU it takes seconds, and of the estimate it is known that it is not far off.
        if not (plan.is_roomy and processes.device.type == "cpu"):
            rehearse(run)
        train_steps(run)
        record["weights_of_step"] = load_best(run)
        if run.held_out and run.last_scores is None:  # resumed after its last step, or with other weights than those
            run.last_scores = score_together(run, run.held_out, Noted())
        figures = finish(run, record) if processes.is_main else {}
    processes.close()
    return figures


def settle_memory(run: Run, beside: int) -> Plan:
    """Settle how the run uses its device; `beside` is what the process took of it before there was a model."""
    available = -run.processes.largest(-device_memory(run.processes.device))  # the smallest of all processes' devices
    needs = needs_of(run.recipe, run.built, run.train_set)
    plan = plan_memory(run.recipe, needs, run.progress, run.processes.device, available)
    run.progress.max_tokens, run.progress.checkpointed_layers = plan.max_tokens, plan.checkpointed_layers
    checkpoint_layers(run.built.base, plan.checkpointed_layers)
    return dataclasses.replace(plan, process=beside)


def begin(run: Run, record: dict[str, Any], *, resumes: bool, overwrite: bool) -> None:
    """Make the directory that of this run from here on, and open what the loop appends to. Raises RunError."""
    directory, recipe, progress = run.directory, run.recipe, run.progress
    parts = [checkpoint_bytes(recipe, run.built, run.optimizer), final_bytes(recipe, run.built)]
    needed = max(parts) if resumes else sum(parts)  # the next checkpoint takes the place of an old one
    require_space(directory.path, needed, "the run", given_up=directory.parts() if overwrite else ())
    if overwrite:
        directory.clear()
    if resumes:
        # Before anything says that the run goes on from here, and before metrics.jsonl is cut back to here: a kill must
        # not leave a later checkpoint that --resume would take together with what is not its own.
        give_up_later(directory.checkpoints, progress.step)
    write_file(directory.manifest, to_json(record))  # first: it says if the recipe is another than before
    write_file(directory.recipe, dump_recipe(recipe))
    run.metrics = MetricsFile(directory.metrics, progress.metrics_length)
    if recipe.train.sample_prompts:
        run.samples = MetricsFile(directory.samples, progress.samples_length)
    for row in read_metrics(directory.metrics):  # as long as it was at the checkpoint
        run.health.see(row)


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
