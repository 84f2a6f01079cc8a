"""What a run is made of, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from orpo_cli.data.dataset import PairSet
from orpo_cli.data.order import Position
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.evaluate import Scores
from orpo_cli.metrics import MetricsFile
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.recipe import Recipe
from orpo_cli.train.diagnosis import Health
from orpo_cli.train.distributed import Processes
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
    """The finite ones of the last steps, as far back as health.py looks."""
    max_tokens: int | None = None
    """Flat tokens of a micro-batch that `auto` came to."""
    checkpointed_layers: int | None = None
    """Layers under gradient checkpointing that `auto` came to."""
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    """Evaluations since the best one."""
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
    without_adapter: Callable[[], AbstractContextManager[None]] | None
    """Turns the adapter off for a while; None where all weights are trained."""
    save: Callable[[], None]
    health: Health
    saved: tuple[int, int] = (0, -1)
    """`step` and `evaluated` of the newest checkpoint; before there is one, of the start."""
    last_scores: Scores | None = None
    """Those of the evaluation after the last step, once it was made."""

    @property
    def epoch(self) -> float:
        """Passes over the data, the current one as the part that is done."""
        return self.train_set.epochs(self.progress.position, self.progress.pairs)

    def use_fewer_tokens(self, tokens: int) -> None:
        """From here on, and after a resume, let a micro-batch have so many: memory ran out."""
        self.max_tokens = self.progress.max_tokens = tokens
