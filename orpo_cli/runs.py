"""`orpo runs`: the runs below some directories, what became of each, and their held-out figures side by side."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orpo_cli.errors import InputError
from orpo_cli.metrics import whole_lines
from orpo_cli.run_directory import LOCK, RunDirectory, open_run, read_eval

FIGURES = {"accuracy": True, "log_odds_ratio": True, "chosen_perplexity": False, "loss": False}
"""The held-out figures of the table, by their names in `eval.json`: whether higher is better."""
SORTABLE = {**FIGURES, "step": True, "beta": False, "learning_rate": False}
"""What runs may be sorted by, and whether the highest comes first."""

# `eval.json`'s names -> those of an evaluation row of `metrics.jsonl`.
_IN_METRICS = {name: f"eval_{name}" for name in FIGURES} | {"chosen_perplexity": "eval_perplexity"}


def list_runs(directories: Sequence[Path], sort: str | None = None) -> list[dict[str, Any]]:
    """One object a run below the directories, by path, or by a figure with the best first and runs without it last."""
    if sort is not None and sort not in SORTABLE:
        raise InputError(f"runs cannot be sorted by {sort!r}", f"but by {', '.join(SORTABLE)}")
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"{directory} is no directory", "name one that holds runs; without a name it is runs/")
    paths = sorted({path for directory in directories for path in find_runs(directory)})
    runs = [describe(RunDirectory(path)) for path in paths]
    if sort is not None:
        sign = -1 if SORTABLE[sort] else 1
        runs.sort(key=lambda run: (run[sort] is None, sign * (run[sort] or 0)))
    return runs


def find_runs(directory: Path) -> Iterator[Path]:
    """Each directory at or below this one that holds a run; hidden ones and the insides of runs are not looked into."""
    for folder, below, files in os.walk(directory):
        if {"recipe.yaml", "manifest.json"} <= set(files):
            below.clear()
            yield Path(folder)
        below[:] = [name for name in below if not name.startswith(".")]


def describe(run: RunDirectory) -> dict[str, Any]:
    """What a run's files say: its state, its last step, the newest held-out figures, and what it was made with."""
    about: dict[str, Any] = dict.fromkeys(
        ("run", "state", "step", "pairs", *FIGURES, "base", "beta", "learning_rate", "seed")
    )
    about["run"] = str(run.path)
    try:
        _, recipe = open_run(run.path)
    except InputError:
        return {**about, "state": "unreadable"}
    rows = whole_lines(run.metrics)
    evaluated = next((row for row in reversed(rows) if "eval_loss" in row), None)
    about |= {
        "step": max((row["step"] for row in rows), default=0),
        "base": recipe.model.name_or_path,
        "beta": recipe.loss.beta,
        "learning_rate": recipe.peak_learning_rate,
        "seed": recipe.train.seed,
    }
    if evaluated is not None:
        about["pairs"] = evaluated["eval_pairs"]
        about |= {name: evaluated[key] for name, key in _IN_METRICS.items()}
    made = [run.merged if recipe.lora is None or recipe.output.merge else run.adapter]
    made += [run.eval] if recipe.data.eval is not None else []
    if is_running(run):
        about["state"] = "running"
    # A run that was prolonged and stopped still has what it made before: then steps follow the last evaluation.
    elif all(path.exists() for path in made) and (evaluated is None or evaluated["step"] == about["step"]):
        about["state"] = "finished"
        try:
            figures = read_eval(run)
        except InputError:
            about["state"], figures = "damaged", {}
        if recipe.data.eval is not None and recipe.train.load_best_model_at_end:  # not the last one's, perhaps
            about |= {name: figures.get(name) for name in _IN_METRICS}
    else:
        about["state"] = "interrupted"
    return about


def is_running(run: RunDirectory) -> bool:
    """Whether a process holds the run's lock at this moment."""
    try:
        descriptor = os.open(run.path / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The runs as aligned columns of text."""
    headings = ("run", "state", "step", "accuracy", "log odds", "perplexity", "loss", "beta", "rate", "base")
    keys = ("run", "state", "step", *FIGURES, "beta", "learning_rate", "base")
    lines = [headings, *(tuple(_cell(key, run[key]) for key in keys) for run in runs)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if key in ("run", "state", "base") else cell.rjust(width)
            for key, cell, width in zip(keys, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "accuracy":
        return f"{value:.1%}"
    if key in FIGURES:
        return f"{value:.4g}"
    return f"{value:g}" if isinstance(value, float) else str(value)
