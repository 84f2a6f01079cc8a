"""What a run says while it runs: a live display on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from orpo_cli import signals
from orpo_cli.redact import redact
from orpo_cli.report.health import Health


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A run is worth more than its reader: `orpo train ... 2>&1 | tee log` goes on, or saves, when tee is gone."""
        self.quiet = True
        signals.silence()


console = _Console(stderr=True, highlight=False, soft_wrap=True)


_muted = False


def mute(muted: bool) -> None:
    """Say nothing but errors, in all processes but the main one."""
    global _muted
    _muted = muted


def say(text: str | Text | Table = "") -> None:
    """A line for people."""
    if _muted:
        return
    console.print(text if not isinstance(text, str) else Text(harmless(text)))


def warn(text: str) -> None:
    """A line that wants attention and stops nothing."""
    if _muted:
        return
    console.print(Text("warning: ", style="yellow") + Text(harmless(text)))


def print_error(message: str, hint: str | None) -> None:
    """`error:` and `hint:` lines."""
    console.print(Text("error: ", style="bold red") + Text(harmless(message)))
    if hint:
        console.print(Text("hint: ", style="cyan") + Text(harmless(hint)))


# Values of a small curve.
SPARKS = 16


class StepDisplay:
    """Progress of the optimizer steps; use as a context manager."""

    def __init__(self, total_steps: int, done: int = 0, health: Health | None = None) -> None:
        """`health` is told of every row, and what it finds is said."""
        self.total_steps = total_steps
        self._health = health
        self._columns: dict[str, deque[float]] = {}
        self._live = console.is_terminal and not _muted
        # How far it is comes first, and stays however narrow the terminal; the figures take what is left.
        self._progress = Progress(
            TextColumn("step", table_column=Column(min_width=4)),
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total_steps)) + 1)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            TimeRemainingColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
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


def number(value: float | None) -> str:
    """A figure in four digits, a dash for none."""
    return "-" if value is None else f"{value:.4g}"


Pieces = Mapping[str, list[tuple[str, bool, bool]]]
"""A pair, token by token: side -> (token, in the NLL, in the odds ratio)."""
_PARTS = {
    (True, True): ("nll+or", "green"),
    (True, False): ("nll", "blue"),
    (False, True): ("or", "magenta"),
    (False, False): ("context", "dim"),
}


def first_pair(pieces: Pieces) -> None:
    """Print both sides of a pair, token by token."""
    say("first pair, as the model sees it (odds ratio + NLL, NLL only, odds ratio only, context only):")
    for line in pair_lines(pieces):
        say(line)


def pair_lines(pieces: Pieces) -> Iterator[Text]:
    """Each side of a pair as a line: runs of tokens bracketed by their part in the loss, and coloured by it."""
    for side, tokens in pieces.items():
        line = Text(f"  {side}: ")
        before = ""
        for token, in_nll, in_odds in tokens:
            part, style = _PARTS[in_nll, in_odds]
            if part != before:
                line.append(f"[{part}]", style="bold")
                before = part
            line.append(visible(token), style=style)
        yield line


def visible(token: str) -> str:
    """A token's text with its white space and control characters made visible; none reaches the terminal."""
    return harmless(token.replace("\n", "⏎").replace("\t", "→").replace("\r", "␍"))


def harmless(text: str) -> str:
    """Text that may come from anyone: line ends stay, escape sequences are shown and not obeyed, secrets are hidden."""
    return "".join(c if c.isprintable() or c in "\n\t\u200d\u00a0" else f"\\x{ord(c):02x}" for c in redact(text))


def comparison(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Table:
    """Held-out figures before and after training, side by side."""
    table = Table(title="held-out", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    if before:
        table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("95 %", justify="left", style="dim")
    for name in (
        "accuracy",
        "log_odds_ratio",
        "chosen_logps",
        "rejected_logps",
        "nll_loss",
        "or_loss",
        "loss",
    ):
        interval = after.get(f"{name}_ci95")
        cells = [name.replace("_", " ")]
        if before:
            cells.append(number(before[f"eval_{name}"]))
        cells.append(number(after[name]))
        cells.append(f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else "")
        table.add_row(*cells)
    return table
