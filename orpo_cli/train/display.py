"""What a run says while it runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from orpo_cli import terminal
from orpo_cli.terminal import number, say, warn
from orpo_cli.train.health import Health

# Values of a small curve.
SPARKS = 16


class StepDisplay:
    """Progress of the optimizer steps; use as a context manager."""

    def __init__(self, total_steps: int, done: int = 0, health: Health | None = None) -> None:
        """`health` is told of every row, and what it finds is said."""
        self.total_steps = total_steps
        self._health = health
        self._columns: dict[str, deque[float]] = {}
        self._live = terminal.is_live()
        # How far it is comes first, and stays however narrow the terminal; the figures take what is left.
        self._progress = Progress(
            TextColumn("step", table_column=Column(min_width=4)),
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total_steps)) + 1)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=terminal.console,
            disable=not self._live,
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("train", total=total_steps, completed=done, figures="")

    def __enter__(self) -> StepDisplay:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a training row of `metrics.jsonl`."""
        figures = (
            f"loss {self._curve('loss', row)}{number(row['loss'])}  nll {number(row['nll_loss'])}  "
            f"log odds ratio {self._curve('log_odds_ratio', row)}{number(row['log_odds_ratio'])}  "
            f"accuracy {number(row['accuracy'])}  {row['tokens_per_second']:,.0f} tok/s"
        )
        if self._live:
            self._progress.update(self._task, completed=row["step"], figures=figures)
        else:
            say(f"step {row['step']}/{self.total_steps}  {figures}  lr {row['learning_rate']:.2e}")
        self._examine(row)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Show an evaluation row of `metrics.jsonl`."""
        say(
            f"held-out at step {row['step']}: loss {number(row['eval_loss'])}  "
            f"accuracy {number(row['eval_accuracy'])}  log odds ratio {number(row['eval_log_odds_ratio'])}  "
            f"log-probs chosen {number(row['eval_chosen_logps'])}, rejected {number(row['eval_rejected_logps'])}"
        )
        self._examine(row)

    def _curve(self, key: str, row: Mapping[str, Any]) -> str:
        """The last values of a column as a small curve, on a terminal only."""
        values = self._columns.setdefault(key, deque(maxlen=SPARKS))
        values.append(math.nan if row[key] is None else row[key])
        return f"{sparkline(values)} " if self._live else ""

    def _examine(self, row: Mapping[str, Any]) -> None:
        for finding in self._health.see(row) if self._health else ():
            warn(f"step {finding.step}: {finding.what}")
            say(f"  {finding.advice}")


def sparkline(values: Iterable[float]) -> str:
    """A bar for each value, from the lowest to the highest; what is not finite is a blank."""
    values = list(values)
    finite = [value for value in values if math.isfinite(value)]
    low, spread = min(finite, default=0.0), (max(finite, default=0.0) - min(finite, default=0.0)) or 1.0
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round((v - low) / spread * 7)] if math.isfinite(v) else " " for v in values)


def diagnosis(health: Health) -> Iterator[str]:
    """What was found of a run's health, as lines."""
    for finding in health.findings():
        yield f"health: {finding.what} ({finding.steps})"
        yield f"  {finding.advice}"
    if not health.found:
        yield f"health: {health.nothing_found}"
