"""The evaluations within a run: done whole, its rows written, or given up at a signal with nothing written."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from orpo_cli.data.batches import flat_tokens
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.files import to_json_lines, write_file
from orpo_cli.generate import Sampling, answer_to, prompt_ids
from orpo_cli.model.logprobs import inference
from orpo_cli.recipe import Recipe
from orpo_cli.scores import Scores, evaluation_row, pair_lines, score_in_parts
from orpo_cli.signals import Noted
from orpo_cli.terminal import say, warn
from orpo_cli.train.display import StepDisplay
from orpo_cli.train.drift import drift
from orpo_cli.train.state import Progress, Run


def evaluation_steps(run: Run) -> set[int]:
    """The steps after which the held-out set is scored: every `eval_steps`, the last always, 0 by `eval_on_start`."""
    section = run.recipe.train
    steps = {run.total_steps}
    if section.eval_steps is not None:
        every = section.eval_steps
        interval = int(every) if every >= 1 else max(1, math.ceil(every * run.total_steps))
        steps |= set(range(interval, run.total_steps, interval))
    return steps | {0} if section.eval_on_start else steps


def evaluate(run: Run, stop: Noted, display: StepDisplay) -> bool:
    """Score the held-out pairs, answer the sample prompts, log both, note the best step so far.

    False, with nothing logged, where a signal came to one of the processes in the middle of it.
    """
    progress, recipe = run.progress, run.recipe
    started = time.perf_counter()
    scores = score_together(run, run.held_out, stop)
    tokens = sum(flat_tokens(pair) for pair in run.held_out)
    cost = run.processes.cost(started, tokens)
    answered = answer_together(run, stop) if scores is not None else None
    if scores is None or answered is None:
        return False

    if run.held_out:
        row = evaluation_row(scores, recipe.loss, progress.step, run.epoch)
        row |= {"eval_tokens": tokens} | {f"eval_{key}": value for key, value in cost.items()}
        note_best(progress, row[recipe.train.metric_for_best_model], recipe)
        if stops := progress.step < run.total_steps and patience_is_over(progress, recipe):
            run.end_after(progress.step)
        if run.metrics is not None:
            row |= drift(run)
            if progress.step == 0:
                write_file(run.directory.start_pairs, to_json_lines(pair_lines(scores, run.held_out)))
            run.metrics.write(row)
            display.evaluated(row)
        if stops:
            name, best = recipe.train.metric_for_best_model, progress.best_step or 0
            say(f"stopping early: {name} has not been better since step {best}")
        if progress.step == run.total_steps:
            run.last_scores = scores
    if run.samples is not None:
        for prompt, (answer, ended) in zip(recipe.train.sample_prompts, answered, strict=True):
            run.samples.write({"step": progress.step, "prompt": prompt, "answer": answer, "ended": ended})
    progress.evaluated = progress.step
    return True


def note_best(progress: Progress, value: float, recipe: Recipe) -> None:
    """Whether this evaluation of a trained model, by its `train.metric_for_best_model`, is the best so far."""
    if progress.step == 0:
        return
    sign = -1 if recipe.train.metric_for_best_model.endswith(("loss", "perplexity")) else 1
    best = progress.best_value
    if math.isfinite(value) and (best is None or sign * value > sign * best):
        progress.best_step, progress.best_value, progress.stale = progress.step, value, 0
    else:
        progress.stale += 1


def patience_is_over(progress: Progress, recipe: Recipe) -> bool:
    """Whether as many evaluations as `train.early_stopping_patience` have brought nothing better."""
    patience = recipe.train.early_stopping_patience
    return patience is not None and progress.stale >= patience


# What a process has to say between two micro-batches; the largest of all is heeded.
DONE, WORKING, STOP = range(3)


def score_together(run: Run, pairs: Sequence[TokenizedPair], stop: Noted) -> Scores | None:
    """Score pairs, each process its share; None where a signal came to one of them.

    Those that are done with their share listen until all are, so that every process takes part in every exchange.
    """
    columns = torch.zeros(4, len(pairs), dtype=torch.float64)
    mine = run.processes.share(range(len(pairs)))
    own = np.zeros((4, len(mine)))
    parts = score_in_parts(
        run.logprobs,
        [pairs[i] for i in mine],
        own,
        nll_tokens=run.recipe.loss.nll_tokens,
        max_tokens=run.max_tokens,
        may_shrink=run.recipe.train.max_tokens_per_microbatch == "auto",
        device=run.processes.device,
    )
    word, max_tokens = WORKING, run.max_tokens
    with inference(run.logprobs), torch.no_grad():
        while heeded := run.processes.largest(STOP if stop.number else word):
            if heeded == STOP:
                return None
            left = next(parts, None)
            word, max_tokens = (DONE, max_tokens) if left is None else (WORKING, left)
    if (max_tokens := -run.processes.largest(-max_tokens)) < run.max_tokens:
        run.progress.max_tokens = max_tokens
        warn(f"out of memory in an evaluation: from here on with {max_tokens:,} tokens at once")
    columns[:, mine] = torch.from_numpy(own)
    if run.processes.count > 1:  # not all devices have float64, but those that several processes share do
        columns = columns.to(run.processes.device)
        run.processes.sum_([columns])
    return Scores(*columns.cpu().numpy())


def answer_together(run: Run, stop: Noted) -> list[tuple[str, bool]] | None:
    """The main process's answers to the sample prompts; None where a signal came to one of the processes."""
    text, found = run.text, []
    for prompt in run.recipe.train.sample_prompts:
        if run.processes.largest(stop.number):
            return None
        if run.processes.is_main:
            asked = prompt_ids(text, prompt, run.recipe.data.system)
            found.append(answer_to(run.built.base, text, asked, Sampling()))
    return found
