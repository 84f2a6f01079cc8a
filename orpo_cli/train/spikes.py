"""Whether a run's numbers are sound: steps that must not be taken, losses that stand out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import RunError
from orpo_cli.terminal import warn
from orpo_cli.train.state import Run

# Steps in a row with a non-finite loss or gradient after which a run stops; float16 first searches its loss scale.
MAX_BAD_STEPS = 3
MAX_BAD_STEPS_FLOAT16 = 25
# Losses that one is compared with, and how many there must be before one is judged.
WINDOW = 64
LEAST = 32
# A spike is so many times the highest of them, and so many robust standard deviations above their median.
RATIO = 1.35
DEVIATIONS = 6.0


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Whether a loss stands out from those of the last steps: well above each, and above what their scatter explains.

    That scatter is the median absolute deviation from the median (times 1.4826, the standard deviation of a normal
    distribution), taken of logarithms: the losses of small batches are skewed, and a spike is a matter of ratio.
    """
    if len(recent) < LEAST or loss <= RATIO * max(recent):
        return False
    logs = np.log(np.maximum(recent, 1e-12))
    median = np.median(logs)
    return math.log(loss) > median + DEVIATIONS * 1.4826 * float(np.median(np.abs(logs - median)))


def note_loss(run: Run, loss: float, pairs: Sequence[TokenizedPair]) -> bool:
    """Remember the finite loss of a step that was taken; whether it is a spike, which is said."""
    recent = run.progress.recent_losses
    spike = is_spike(loss, recent)
    if spike:
        warn(
            f"step {run.progress.step}: the loss of {loss:.4g} stands out from the last {len(recent)} steps' median of "
            f"{np.median(recent):.4g} ({rows_of(pairs)})"
        )
    run.progress.recent_losses = [*recent, loss][-WINDOW:]
    return spike


def note_bad_step(run: Run, loss: float, pairs: Sequence[TokenizedPair]) -> None:
    """Say which pairs gave a non-finite loss or gradient. Raises RunError after a few such steps in a row."""
    what = "gradient" if math.isfinite(loss) else "loss"
    scaling = run.scaler.is_enabled()
    if not scaling or run.progress.bad_steps > 3:
        warn(f"step {run.progress.step} skipped: its {what} is not finite ({rows_of(pairs)})")
    if run.progress.bad_steps >= (MAX_BAD_STEPS_FLOAT16 if scaling else MAX_BAD_STEPS):
        raise RunError(
            f"the {what} was not finite in {run.progress.bad_steps} steps in a row",
            "lower train.learning_rate, or use dtype: bfloat16 or float32; the last checkpoint is from before them",
        )


def rows_of(pairs: Sequence[TokenizedPair]) -> str:
    """The pairs, named by their rows in the source."""
    return "rows " + ", ".join(str(pair.index) for pair in pairs)
