"""The training loop: batch, loss, backward, finite check, step, log, evaluate, save."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orpo_cli.data.batches import FlatBatch, flat_batch, flat_tokens, nll_positions
from orpo_cli.data.dataset import PairSet
from orpo_cli.data.order import Position
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import RunError, Stopped, is_out_of_memory
from orpo_cli.evaluate import Scores, evaluation_row, score_pairs
from orpo_cli.loss import METRICS, orpo_loss
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.recipe import Recipe
from orpo_cli.report.metrics import MetricsFile
from orpo_cli.report.terminal import StepDisplay, warn
from orpo_cli.train.ahead import Ahead
from orpo_cli.train.distributed import Processes, seed_everything
from orpo_cli.train.optimizer import Optimizer, learning_rate

# Steps in a row with a non-finite loss or gradient after which a run stops; float16 first searches its loss scale.
MAX_BAD_STEPS = 3
MAX_BAD_STEPS_FLOAT16 = 25
# Steps whose batches are made ahead of the one that is computed.
STEPS_AHEAD = 2


@dataclass
class Progress:
    """How far a run is: what a checkpoint's `state.json` holds beside the tensors."""

    step: int = 0
    pairs: int = 0
    """Pairs trained on, repeats counted."""
    position: Position = field(default_factory=Position)
    metrics_length: int = 0
    """Bytes of metrics.jsonl."""
    samples_length: int = 0
    """Bytes of samples.jsonl."""
    bad_steps: int = 0
    """Steps in a row that were skipped for a non-finite gradient."""
    max_tokens: int | None = None
    """Flat tokens of a micro-batch that `auto` came to."""
    checkpointed_layers: int | None = None
    """Layers under gradient checkpointing that `auto` came to."""
    best_step: int | None = None
    best_value: float | None = None
    loss_scale: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """All that the loop works with."""

    recipe: Recipe
    processes: Processes
    logprobs: PairLogprobs
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    train_set: PairSet
    total_steps: int
    max_tokens: int
    progress: Progress
    held_out: list[TokenizedPair]
    """Pairs to evaluate on, in source order; none where the recipe names none."""
    metrics: MetricsFile | None
    """None in all processes but the main one."""
    samples: MetricsFile | None
    answer: Callable[[Sequence[str]], list[tuple[str, bool]]]
    """Greedy answers to prompts, and whether each ended by itself."""
    save: Callable[[], None]
    last_scores: Scores | None = None
    """Those of the evaluation after the last step, once it was made."""


def train_steps(run: Run) -> None:
    """Run all optimizer steps that are still to come.

    The loss of a step is normalised by the whole step's pairs (or tokens), so its gradient is the same however the
    step is cut into micro-batches and spread over processes. Raises RunError when the numbers have gone bad and
    Stopped when a signal ended the run, after a checkpoint.
    """
    recipe, section, progress = run.recipe, run.recipe.train, run.progress
    processes, optimizer = run.processes, run.optimizer
    evaluations = evaluation_steps(run)
    with (
        signals_noted() as signals,
        StepDisplay(run.total_steps, progress.step) as display,
        Ahead(steps_to_come(run), STEPS_AHEAD) as steps,
    ):
        if progress.step == 0 and section.eval_on_start:
            _evaluate(run, display)
        for step in range(progress.step + 1, run.total_steps + 1):
            started = time.perf_counter()
            data = next(steps)
            pairs = data.pairs
            rate = learning_rate(step, run.total_steps, section, peak=recipe.peak_learning_rate)
            sums = gradients_within_memory(run, step, data)
            processes.sum_([*optimizer.gradients(), sums])
            run.scaler.unscale_(optimizer.adamw)
            grad_norm = optimizer.clip()
            # A step's only transfer from the device. It waits for the gradients, since what is not finite must not
            # reach the weights; to pass over them on the device instead would spare a pause of a few kernel launches.
            *means, tokens, norm = torch.cat([sums, grad_norm[None]]).tolist()
            values = dict(zip(METRICS, means, strict=True))
            loss_value = values["nll_loss"] + recipe.loss.beta * values["or_loss"]
            finite = math.isfinite(loss_value) and math.isfinite(norm)
            if finite:
                optimizer.step(rate)
            else:
                optimizer.zero_grad()
            run.scaler.update()

            progress.step, progress.position = step, data.position
            progress.pairs += len(pairs)
            progress.bad_steps = 0 if finite else progress.bad_steps + 1
            if step % section.logging_steps == 0 or step == run.total_steps or not finite:
                row = {
                    "step": step,
                    "epoch": _epoch(run),
                    "loss": loss_value,
                    **values,
                    "perplexity": math.exp(min(-values["chosen_logps"], 700.0)),
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "pairs": len(pairs),
                    "tokens": int(tokens),
                    "pairs_digest": pairs_digest(pairs),
                    **_cost(started, tokens, run.processes.device),
                    **({} if finite else {"skipped": True}),
                }
                if run.metrics is not None:
                    run.metrics.write(row)
                    display.step(row)
            if not finite:
                _report_bad_step(run, pairs, loss_value)
            if step in evaluations:
                _evaluate(run, display)
            stopped_by = processes.largest(signals.number)
            if step % section.save_steps == 0 or step in (progress.best_step, run.total_steps) or stopped_by:
                _checkpoint(run)
            if stopped_by:
                raise Stopped(
                    stopped_by,
                    f"stopped by {signal.Signals(stopped_by).name} after step {step}; all is saved",
                )


@dataclass(frozen=True)
class StepData:
    """One optimizer step: all of its pairs, and this process's share of them as micro-batches, still on the CPU."""

    pairs: list[TokenizedPair]
    position: Position
    """The place in the data after this step."""
    max_tokens: int
    """Flat tokens that a micro-batch was allowed."""
    micro_batches: list[FlatBatch]


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
    """The step of these pairs, this process's share cut into micro-batches of at most `run.max_tokens` tokens."""
    max_tokens = run.max_tokens
    parts = run.logprobs.micro_batches(run.processes.share(pairs), max_tokens)
    batches = [flat_batch(part, run.recipe.loss.nll_tokens) for part in parts]
    if run.processes.device.type == "cuda":
        batches = [batch.pinned() for batch in batches]
    return StepData(pairs, position, max_tokens, batches)


def gradients_within_memory(run: Run, step: int, data: StepData) -> Tensor:
    """As step_gradients; when memory runs out, `auto` halves its token budget, for good, and computes the step anew.

    Raises what told of it once the budget is down to the step's longest pair.
    """
    while True:
        if data.max_tokens != run.max_tokens:
            data = cut(run, data.pairs, data.position)
        sizes = [run.logprobs.tokens(pair) for pair in data.pairs]
        largest_share = max(sum(sizes[rank :: run.processes.count]) for rank in range(run.processes.count))
        smaller = max(*sizes, min(run.max_tokens, largest_share) // 2)
        may_retry = run.recipe.train.max_tokens_per_microbatch == "auto" and smaller < run.max_tokens
        ran_out = False
        try:
            sums = step_gradients(run, step, data)
        except (MemoryError, RuntimeError) as error:
            if not (may_retry and is_out_of_memory(error)):
                raise
            ran_out = True
        if not (may_retry and run.processes.largest(int(ran_out))):
            return sums
        run.max_tokens = run.progress.max_tokens = smaller
        run.optimizer.zero_grad()
        if run.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        warn(f"out of memory in step {step}: computed anew, from here on with {smaller:,} tokens at once")


def step_gradients(run: Run, step: int, data: StepData) -> Tensor:
    """Leave the gradient of the whole step, this process's share of it, with the optimizer.

    Returns (len(METRICS) + 1,) on the device: the share of the step's metrics, and of its tokens.
    """
    recipe, device = run.recipe, run.processes.device
    seed_everything(recipe.train.seed, step, run.processes.rank)
    nll_total = _nll_total(data.pairs, recipe)
    sums = torch.zeros(len(METRICS) + 1, device=device)
    for batch in data.micro_batches:
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
        run.scaler.scale(loss).backward()
        sums[:-1] += shares
        sums[-1] += batch.tokens
    return sums


def evaluation_steps(run: Run) -> set[int]:
    """The steps after which the held-out set is scored: every `eval_steps`, and the last one always."""
    every = run.recipe.train.eval_steps
    steps = {run.total_steps}
    if every is not None:
        interval = every if every >= 1 else max(1, math.ceil(every * run.total_steps))
        steps |= set(range(int(interval), run.total_steps, int(interval)))
    return steps


def pairs_digest(pairs: list[TokenizedPair]) -> str:
    """Sixteen hexadecimal digits that stand for these pairs' positions, in order."""
    positions = np.array([pair.index for pair in pairs], dtype="<i8")
    return hashlib.sha256(positions.tobytes()).hexdigest()[:16]


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


@dataclass
class SignalsNoted:
    """The first signal that asked the run to stop; 0: none."""

    number: int = 0


@contextmanager
def signals_noted() -> Iterator[SignalsNoted]:
    """Note SIGINT, SIGTERM and SIGHUP instead of dying, so that the loop can save first; a second SIGINT kills."""
    noted = SignalsNoted()

    def note(number: int, frame: FrameType | None) -> None:
        if noted.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.number = noted.number or number
        # Not through the console: the signal may have come in the middle of one of its own writes.
        os.write(2, b"\nstopping: this step is finished and saved first; Ctrl-C again leaves at once\n")

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in watched}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pairs_left(run: Run) -> int | None:
    """Pairs still to be trained on; None: as many as the steps take."""
    total = run.train_set.total_pairs(run.recipe.train)
    return None if total is None else total - run.progress.pairs


def _nll_total(pairs: list[TokenizedPair], recipe: Recipe) -> float:
    """What the step's NLL is divided by: its pairs, or the tokens that the NLL is taken over."""
    if recipe.loss.nll_reduction == "pair":
        return len(pairs)
    return max(1, sum(len(nll_positions(pair, recipe.loss.nll_tokens)) for pair in pairs))


def score_together(run: Run) -> Scores:
    """Score the held-out pairs, each process its share."""
    mine = run.processes.share(range(len(run.held_out)))
    pairs = [run.held_out[i] for i in mine]
    nll_tokens, device = run.recipe.loss.nll_tokens, run.processes.device
    own = score_pairs(run.logprobs, pairs, nll_tokens=nll_tokens, max_tokens=run.max_tokens, device=device)
    columns = torch.zeros(4, len(run.held_out), dtype=torch.float64)
    columns[:, mine] = torch.from_numpy(np.stack(dataclasses.astuple(own)))
    if run.processes.count > 1:  # not all devices have float64, but those that several processes share do
        columns = columns.to(device)
        run.processes.sum_([columns])
    return Scores(*columns.cpu().numpy())


def _evaluate(run: Run, display: StepDisplay) -> None:
    """Score the held-out pairs, answer the sample prompts, log both, note the best step so far."""
    progress, recipe = run.progress, run.recipe
    if run.held_out:
        started = time.perf_counter()
        scores = score_together(run)
        row = evaluation_row(scores, recipe.loss, progress.step, _epoch(run))
        tokens = sum(flat_tokens(pair) for pair in run.held_out)
        row |= {"eval_tokens": tokens} | {
            f"eval_{key}": value for key, value in _cost(started, tokens, run.processes.device).items()
        }
        if run.metrics is not None:
            run.metrics.write(row)
            display.evaluated(row)
        name = recipe.train.metric_for_best_model
        sign = -1 if name.endswith(("loss", "perplexity")) else 1
        best = progress.best_value
        if progress.step and math.isfinite(row[name]) and (best is None or sign * row[name] > sign * best):
            progress.best_step, progress.best_value = progress.step, row[name]
        if progress.step == run.total_steps:
            run.last_scores = scores
    if run.samples is not None:
        prompts = recipe.train.sample_prompts
        for prompt, (answer, ended) in zip(prompts, run.answer(prompts), strict=True):
            run.samples.write({"step": progress.step, "prompt": prompt, "answer": answer, "ended": ended})


def _epoch(run: Run) -> float:
    return run.train_set.epochs(run.progress.position, run.progress.pairs)


def _cost(started: float, tokens: float, device: torch.device) -> dict[str, float]:
    """What differs between two equal runs: time since `started`, speed, memory."""
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gib": peak_memory_gib(device),
    }


def _checkpoint(run: Run) -> None:
    progress = run.progress
    progress.metrics_length = run.metrics.sync() if run.metrics else 0
    progress.samples_length = run.samples.sync() if run.samples else 0
    progress.loss_scale = run.scaler.state_dict()
    run.save()
    run.processes.wait()


def _report_bad_step(run: Run, pairs: list[TokenizedPair], loss: float) -> None:
    """Say which pairs gave a non-finite gradient; after a few such steps in a row, give up."""
    rows = ", ".join(str(pair.index) for pair in pairs)
    what = "gradient" if math.isfinite(loss) else "loss"
    scaling = run.scaler.is_enabled()
    if not scaling or run.progress.bad_steps > 3:
        warn(f"step {run.progress.step} skipped: its {what} is not finite (rows {rows})")
    if run.progress.bad_steps >= (MAX_BAD_STEPS_FLOAT16 if scaling else MAX_BAD_STEPS):
        raise RunError(
            f"the {what} was not finite in {run.progress.bad_steps} steps in a row",
            "lower train.learning_rate, or use dtype: bfloat16 or float32; the last checkpoint is sound",
        )
