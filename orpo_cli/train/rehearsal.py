"""The longest micro-batches, computed once before the first step: memory runs out then, or not at all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from orpo_cli.data.dataset import PairSet
from orpo_cli.data.order import Position
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.memory import fixed_memory, made_up_pair
from orpo_cli.signals import Noted
from orpo_cli.train.distributed import random_states_kept
from orpo_cli.train.evaluation import score_together
from orpo_cli.train.loop import cut, gradients_within_memory
from orpo_cli.train.state import Run


def rehearse(run: Run) -> None:
    """Compute the micro-batches that take the most, of training and of evaluation, and forget what came of it.

    Where memory runs out, `auto` halves its token budget as in a step. Besides, nothing changes: no weight, no random
    state, no metric. Every process computes the same pairs. What the optimizer will hold from its first step on is set
    aside meanwhile.
    """
    if run.progress.step == run.total_steps:
        return
    recipe, count, device = run.recipe, run.processes.count, run.processes.device
    with random_states_kept(device):
        of_process = math.ceil(recipe.train.batch_size / count)
        longest = longest_pairs(run.logprobs, run.train_set, recipe.data.max_length, of_process)
        pairs = largest(run.logprobs, run.rounds(longest, run.max_tokens))
        run.optimizer.gradients()
        moments = 0 if run.optimizer.adamw.state else fixed_memory(run.logprobs.model, recipe.train.optimizer).optimizer
        room = torch.empty(moments, dtype=torch.uint8, device=device)
        # Each process's share of `count` copies is one of each pair.
        step = run.progress.step + 1
        gradients_within_memory(run, step, cut(run, [pair for pair in pairs for _ in range(count)], Position()))
        run.optimizer.zero_grad()
        if run.held_out:
            longest = sorted(run.held_out, key=run.logprobs.tokens, reverse=True)
            pairs = largest(run.logprobs, [[part] for part in run.logprobs.micro_batches(longest, run.max_tokens)])
            score_together(run, [pair for pair in pairs for _ in range(count)], Noted())
        del room


def longest_pairs(logprobs: PairLogprobs, pairs: PairSet, max_length: int, count: int = 1) -> list[TokenizedPair]:
    """The `count` pairs of a set with the most tokens, or all; of a stream, whose pairs nobody knows yet, made up."""
    if pairs.held is not None:
        return sorted(pairs.held.values(), key=logprobs.tokens, reverse=True)[:count]
    return [made_up_pair(max_length, logprobs.model.config.get_text_config().vocab_size)] * count


def largest(logprobs: PairLogprobs, rounds: Sequence[Sequence[Sequence[TokenizedPair]]]) -> list[TokenizedPair]:
    """Pairs that are computed at once with the longest of all, and those of the round with most tokens."""
    together = [[pair for part in parts for pair in part] for parts in rounds]
    with_longest = max(together, key=lambda pairs: max(map(logprobs.tokens, pairs)))
    fullest = max(together, key=lambda pairs: logprobs.tokens(*pairs))
    return with_longest if fullest is with_longest else with_longest + fullest
