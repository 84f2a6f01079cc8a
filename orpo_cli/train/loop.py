"""The training loop: batch, loss, backward, finite check, step, log, evaluate, save."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from orpo_cli.data.batches import FlatBatch, flat_batch, nll_positions
from orpo_cli.data.order import Position
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import Stopped, is_out_of_memory
from orpo_cli.loss import METRICS, orpo_loss
from orpo_cli.model.lanes import in_lanes
from orpo_cli.recipe import Recipe
from orpo_cli.signals import Noted, noted
from orpo_cli.terminal import warn
from orpo_cli.train.ahead import Ahead
from orpo_cli.train.display import StepDisplay
from orpo_cli.train.distributed import seed_everything
from orpo_cli.train.evaluation import evaluate, evaluation_steps
from orpo_cli.train.optimizer import learning_rate
from orpo_cli.train.save import save
from orpo_cli.train.spikes import note_bad_step, note_loss
from orpo_cli.train.state import Run

# Steps whose batches are made ahead of the one that is computed.
STEPS_AHEAD = 2
STOPPING = "stopping: what is computed now is finished or given up, and saved; Ctrl-C again leaves at once"


def train_steps(run: Run) -> None:
    """Run all optimizer steps that are still to come, with their evaluations and checkpoints.

    The loss of a step is normalised by the whole step's pairs (or tokens), so its gradient is the same however the
    step is cut into micro-batches and spread over processes. Raises RunError when the numbers have gone bad and
    Stopped when a signal ended the run, after a checkpoint.
    """
    recipe, section, progress, processes = run.recipe, run.recipe.train, run.progress, run.processes
    run.saved = progress.step, progress.evaluated
    with (
        noted(STOPPING if processes.is_main else None) as stop,
        StepDisplay(run.total_steps, progress.step, run.health) as display,
        Ahead(steps_to_come(run), STEPS_AHEAD, given_up=lambda: stop.number > 0) as steps,
    ):
        conclude_step(run, stop, display)  # of the base, or of the step that a signal ended the run after
        while progress.step < run.total_steps:
            started = time.perf_counter()
            data = next(steps, None)
            leave_if_asked(run, stop)
            assert data is not None, "steps end before the last one only when they are given up"
            step, pairs = progress.step + 1, data.pairs
            rate = learning_rate(step, run.total_steps, section, peak=recipe.peak_learning_rate)
            outcome = take_step(run, step, data, rate)

            progress.step, progress.position = step, data.position
            progress.pairs += len(pairs)
            progress.bad_steps = 0 if outcome.is_finite else progress.bad_steps + 1
            spike = outcome.is_finite and note_loss(run, outcome.loss, pairs)
            if step % section.logging_steps == 0 or step == run.total_steps or spike or not outcome.is_finite:
                row = {
                    "step": step,
                    "epoch": run.epoch,
                    "loss": outcome.loss,
                    **outcome.means,
                    "perplexity": math.exp(min(-outcome.means["chosen_logps"], 700.0)),
                    "learning_rate": rate,
                    "grad_norm": outcome.grad_norm,
                    "pairs": len(pairs),
                    "tokens": outcome.tokens,
                    "pairs_digest": pairs_digest(pairs),
                    **processes.cost(started, outcome.tokens),
                }
                if spike or not outcome.is_finite:
                    row |= {"spike" if spike else "skipped": True, "indices": [pair.index for pair in pairs]}
                if run.metrics is not None:
                    run.metrics.write(row)
                    display.step(row)
            if not outcome.is_finite:
                note_bad_step(run, outcome.loss, pairs)
            conclude_step(run, stop, display)
        leave_if_asked(run, stop)


@dataclass(frozen=True)
class Outcome:
    """What one optimizer step came to, over all processes."""

    loss: float
    means: dict[str, float]
    """METRICS by name, over the step's pairs."""
    tokens: int
    """Of all flat batches."""
    grad_norm: float
    """Before clipping."""

    @property
    def is_finite(self) -> bool:
        """Whether the step was taken: neither its loss nor its gradient is an infinity or NaN."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def take_step(run: Run, step: int, data: StepData, rate: float) -> Outcome:
    """Compute the gradient of a step and update the weights by it, unless something in it is not finite."""
    optimizer = run.optimizer
    sums = gradients_within_memory(run, step, data)
    run.processes.sum_([*optimizer.gradients(), sums])
    run.scaler.unscale_(optimizer.adamw)
    norm = optimizer.clip()
    # One transfer from the device for all that is to be known of the step. It waits for the gradients, since what is
    # not finite must not reach the weights; to pass over them on the device instead would spare a pause of a few
    # kernel launches.
    *of_metrics, tokens, grad_norm = torch.cat([sums, norm[None]]).tolist()
    means = dict(zip(METRICS, of_metrics, strict=True))
    loss = means["nll_loss"] + run.recipe.loss.beta * means["or_loss"]
    outcome = Outcome(loss, means, int(tokens), grad_norm)
    if outcome.is_finite:
        optimizer.step(rate)
    else:
        optimizer.zero_grad()
    run.scaler.update()
    return outcome


def conclude_step(run: Run, stop: Noted, display: StepDisplay) -> None:
    """Evaluate and save where that is due after a step. A signal ends the evaluation, which stays due."""
    progress, section = run.progress, run.recipe.train
    due = progress.step in evaluation_steps(run) and progress.evaluated < progress.step
    if due and not evaluate(run, stop, display):
        return
    # After a step that was not taken there is nothing new to save, and the checkpoints from before it are to stay.
    regular = progress.step % section.save_steps == 0 and not progress.bad_steps
    if regular or progress.step in (progress.best_step, run.total_steps):
        checkpoint(run)


def checkpoint(run: Run) -> None:
    """Save the run as it is after this step, unless that has been done."""
    progress = run.progress
    if progress.step == 0 or run.saved == (progress.step, progress.evaluated):
        return
    progress.metrics_length = run.metrics.sync() if run.metrics else 0
    progress.samples_length = run.samples.sync() if run.samples else 0
    progress.loss_scale = run.scaler.state_dict()
    if run.processes.is_main:
        save(run)
    run.processes.wait()
    run.saved = progress.step, progress.evaluated


def leave_if_asked(run: Run, stop: Noted) -> None:
    """Save and raise Stopped if a signal has come to any of the processes."""
    number, step = run.processes.largest(stop.number), run.progress.step
    if number:
        checkpoint(run)
        what = f"after step {step}; all is saved, and --resume goes on" if step else "before step 1; nothing is to save"
        raise Stopped(number, f"stopped by {signal.Signals(number).name} {what}")


@dataclass(frozen=True)
class StepData:
    """One optimizer step: all of its pairs, and this process's share of them in micro-batches, still on the CPU."""

    pairs: list[TokenizedPair]
    position: Position
    """The place in the data after this step."""
    max_tokens: int
    """Flat tokens that were allowed at once."""
    rounds: list[list[FlatBatch]]
    """Micro-batches, those together that are computed side by side."""


def steps_to_come(run: Run) -> Iterator[StepData]:
    """What each step that is still to come is made of, from the run's position on. Reads, tokenises, lays out."""
    section, device = run.recipe.train, run.processes.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # every thread begins on the first one
    steps = run.train_set.steps(
        section.batch_size,
        seed=section.seed,
        shuffle=run.recipe.data.shuffle,
        start=run.progress.position,
        total_pairs=_pairs_left(run),
    )
    # Not a step more: what a stream has read by the end is counted in the manifest.
    for pairs, position in islice(steps, run.total_steps - run.progress.step):
        yield cut(run, pairs, position)


def cut(run: Run, pairs: list[TokenizedPair], position: Position) -> StepData:
    """The step of these pairs, this process's share cut into rounds of at most `run.max_tokens` tokens."""
    max_tokens = run.max_tokens
    rounds = run.rounds(run.processes.share(pairs), max_tokens)
    laid_out = [[flat_batch(part, run.recipe.loss.nll_tokens) for part in parts] for parts in rounds]
    if run.processes.device.type == "cuda":
        laid_out = [[batch.pinned() for batch in batches] for batches in laid_out]
    return StepData(pairs, position, max_tokens, laid_out)


def gradients_within_memory(run: Run, step: int, data: StepData) -> Tensor:
    """As step_gradients; when memory runs out, `auto` halves its token budget, for good, and computes the step anew.

    Raises MemoryError in all processes once the budget is down to the step's longest pair, or is the user's.
    """
    while True:
        if data.max_tokens != run.max_tokens:
            data = cut(run, data.pairs, data.position)
        told = ""
        try:
            sums = step_gradients(run, step, data)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            told = str(error) or "out of memory"
        if not run.processes.largest(int(told != "")):
            return sums
        tried = [
            [pair for part in parts for pair in part]
            for share in run.processes.shares(data.pairs)
            for parts in run.rounds(share, run.max_tokens)
        ]
        smaller = run.logprobs.smaller_budget(max(tried, key=lambda pairs: run.logprobs.tokens(*pairs)), data.pairs)
        if smaller is None or run.recipe.train.max_tokens_per_microbatch != "auto":
            raise MemoryError(told or "out of memory in another process")
        run.progress.max_tokens = smaller
        run.optimizer.zero_grad()
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        warn(f"out of memory: computed anew, from here on with {smaller:,} tokens at once")


def step_gradients(run: Run, step: int, data: StepData) -> Tensor:
    """Leave the gradient of the whole step, this process's share of it, with the optimizer.

    Returns (len(METRICS) + 1,) on the device: the share of the step's metrics, and of its tokens.
    """
    recipe, device = run.recipe, run.processes.device
    seed_everything(recipe.train.seed, step, run.processes.rank)
    nll_total = _nll_total(data.pairs, recipe)
    sums = torch.zeros(len(METRICS) + 1, device=device)
    scale = run.scaler.scale(torch.ones((), device=device))

    def loss_of(batch: FlatBatch) -> tuple[Tensor, Tensor]:
        """A micro-batch's share of the loss, scaled for backward, and of `sums`."""
        batch = batch.to(device)
        logps = run.logprobs(batch)
        nll = -(batch.nll.means(logps) if recipe.loss.nll_reduction == "pair" else batch.nll.sums(logps))
        loss, shares = orpo_loss(
            batch.chosen.means(logps),
            batch.rejected.means(logps),
            nll,
            beta=recipe.loss.beta,
            nll_total=nll_total,
            pairs=len(data.pairs),
        )
        return scale * loss, torch.cat([shares, shares.new_tensor([batch.tokens])])

    def gradients_of(batch: FlatBatch) -> tuple[Sequence[Tensor | None], Tensor]:
        """A micro-batch's own gradients, one for each trained parameter, and its share of `sums`."""
        loss, shares = loss_of(batch)
        return torch.autograd.grad(loss, run.optimizer.trained, allow_unused=True), shares

    for batches in data.rounds:
        if len(batches) == 1:
            loss, shares = loss_of(batches[0])
            loss.backward()
            sums += shares
            continue
        lanes = in_lanes(gradients_of, batches)
        while lanes:  # added up in their order, whichever was done first, and let go
            gradients, shares = lanes.pop(0)
            run.optimizer.add_gradients(gradients)
            sums += shares
            del gradients
    return sums


def pairs_digest(pairs: list[TokenizedPair]) -> str:
    """Sixteen hexadecimal digits that stand for these pairs' positions, in order."""
    positions = np.array([pair.index for pair in pairs], dtype="<i8")
    return hashlib.sha256(positions.tobytes()).hexdigest()[:16]


def _pairs_left(run: Run) -> int | None:
    """Pairs still to be trained on; None: as many as the steps take."""
    total = run.train_set.total_pairs(run.recipe.train)
    return None if total is None else total - run.progress.pairs


def _nll_total(pairs: list[TokenizedPair], recipe: Recipe) -> float:
    """What the step's NLL is divided by: its pairs, or the tokens that the NLL is taken over."""
    if recipe.loss.nll_reduction == "pair":
        return len(pairs)
    return max(1, sum(len(nll_positions(pair, recipe.loss.nll_tokens)) for pair in pairs))
