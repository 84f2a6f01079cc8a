"""What a run is made of, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from orpo_cli.data.dataset import PairSet
from orpo_cli.data.order import Position
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.metrics import MetricsFile
from orpo_cli.model.build import Built, TextSide
from orpo_cli.model.lanes import lanes_for, most_lanes
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.recipe import Recipe
from orpo_cli.run_directory import RunDirectory
from orpo_cli.scores import Scores
from orpo_cli.train.distributed import Processes
from orpo_cli.train.health import Health
from orpo_cli.train.optimizer import Optimizer


@dataclass
class Progress:
    """How far a run is: what a checkpoint's `state.json` holds beside the tensors."""

    step: int = 0
    evaluated: int = -1
    """The step after which the held-out set was last scored; before `step`'s own evaluation, one that is past."""
    pairs: int = 0
    """Pairs trained on, repeats counted."""
    position: Position = field(default_factory=Position)
    metrics_length: int = 0
    """Bytes of metrics.jsonl."""
    samples_length: int = 0
    """Bytes of samples.jsonl."""
    bad_steps: int = 0
    """Steps in a row that were skipped for a non-finite gradient."""
    recent_losses: list[float] = field(default_factory=list)
    """The finite ones of the last steps, as far back as spikes.py looks."""
    max_tokens: int | None = None
    """Flat tokens computed at once: the recipe's, or what `auto` has come to, fewer where memory ran out."""
    checkpointed_layers: int | None = None
    """Layers under gradient checkpointing that `auto` came to."""
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    """Evaluations since the best one."""
    loss_scale: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """All that a run works with, and how far it has come."""

    recipe: Recipe
    directory: RunDirectory
    processes: Processes
    text: TextSide
    built: Built
    train_set: PairSet
    held_out_set: PairSet | None
    progress: Progress = field(default_factory=Progress)
    metrics: MetricsFile | None = None
    """None in all processes but the main one."""
    samples: MetricsFile | None = None
    """None as well where there are no sample prompts."""
    saved: tuple[int, int] = (0, -1)
    """`step` and `evaluated` of the newest checkpoint; before there is one, of the start."""
    last_scores: Scores | None = None
    """Those of the evaluation after the last step, once it was made."""
    held_out: list[TokenizedPair] = field(init=False)
    """Pairs to evaluate on, in source order; none where the recipe names none."""
    total_steps: int = field(init=False)
    optimizer: Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    health: Health = field(init=False)
    most_lanes: int = field(init=False)
    """How many micro-batches a training step may compute side by side."""

    def __post_init__(self) -> None:
        self.held_out = self.held_out_set.in_source_order() if self.held_out_set else []
        self.total_steps = self.train_set.total_steps(self.recipe.train)
        self.optimizer = Optimizer(self.built.model.named_parameters(), self.recipe.train)
        is_float16 = self.built.base.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=is_float16)
        self.health = Health(self.recipe.loss.beta, self.total_steps)
        self.most_lanes = most_lanes(self.built.logprobs)

    @property
    def logprobs(self) -> PairLogprobs:
        """The model as the loop calls it."""
        return self.built.logprobs

    @property
    def max_tokens(self) -> int:
        """Flat tokens computed at once, when they are settled."""
        assert self.progress.max_tokens is not None
        return self.progress.max_tokens

    def rounds(self, pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[list[TokenizedPair]]]:
        """Pairs of a training step in micro-batches, those together that are computed at once."""
        return self.logprobs.rounds(pairs, max_tokens, lanes_for(max_tokens, self.most_lanes))

    @property
    def epoch(self) -> float:
        """Passes over the data, the current one as the part that is done."""
        return self.train_set.epochs(self.progress.position, self.progress.pairs)

    def end_after(self, steps: int) -> None:
        """Let the run have so many steps."""
        self.total_steps = self.health.total_steps = steps
