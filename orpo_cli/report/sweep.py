"""What `orpo sweep` found: its runs side by side, the best of them and what it costs, as a table and on a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from orpo_cli.report.page import note, table
from orpo_cli.terminal import say

PAGE = "sweep.html"
"""Its file, beside `sweep.json`."""
_HEADINGS = {"chosen_perplexity": "perplexity", "ended": "answers end"}
_WORDS = {
    "best": "best",
    "tied": "as good, within chance",
    "lower": "worse",
    "perplexity": "out: perplexity",
    "answers": "out: answers do not end",
    "no figures": "out: not finite",
    "failed": "failed",
}


def show(summary: Mapping[str, Any]) -> None:
    """The runs as a table, the best one, and what it cost, on stderr."""
    told = Table(title=title(summary), title_justify="left", box=None)
    for heading in headings(summary):
        told.add_column(heading, justify="left" if heading in ("run", "") else "right")
    for run, cells in zip(summary["runs"], rows(summary, between="\n"), strict=True):
        told.add_row(*cells, style="bold" if run["verdict"] == "best" else None)
    say()
    say(told)
    for line in conclusion(summary):
        say(line)
    if any(run["state"] == "finished" for run in summary["runs"]):
        say(f"page: {Path(summary['directory']) / PAGE}")


def section(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """The same for the page: id, heading and inside of its first section."""
    return "sweep", title(summary), table(headings(summary), rows(summary)) + "".join(map(note, conclusion(summary)))


def title(summary: Mapping[str, Any]) -> str:
    """By what the best was chosen."""
    return f"Chosen by {summary['metric'].replace('_', ' ')}"


def _shown(summary: Mapping[str, Any]) -> list[str]:
    """The figures that the choice weighs."""
    return list(dict.fromkeys((summary["metric"], "accuracy", "chosen_perplexity", "ended")))


def headings(summary: Mapping[str, Any]) -> list[str]:
    """Of the columns of a table of the runs."""
    return ["run", *(_HEADINGS.get(key, key.replace("_", " ")) for key in _shown(summary)), ""]


def rows(summary: Mapping[str, Any], between: str = " ") -> Iterator[list[str]]:
    """A run's cells: its name, figures with their intervals, and its verdict."""
    for run in summary["runs"]:
        yield [run["run"], *(_cell(run, key, between) for key in _shown(summary)), _WORDS[run["verdict"]]]


def _cell(run: Mapping[str, Any], key: str, between: str = " ") -> str:
    """A figure and its interval."""
    if run.get(key) is None:
        return "-"
    form = "{:.1%}" if key in ("accuracy", "ended") else "{:.4g}"
    value, low, high = (form.format(number) for number in (run[key], *run[f"{key}_ci95"]))
    return f"{value}{between}({low} to {high})"


def conclusion(summary: Mapping[str, Any]) -> Iterator[str]:
    """Which run is the best, what it costs, and where its recipe is; nothing where none is."""
    best = summary["best"]
    if best is None:
        return
    if not any(run.get("ended") for run in summary["runs"]):
        tokens = summary["answers"]["max_new_tokens"]
        yield f"no answer of any run ended within {tokens} tokens, which decided nothing: raise --max-new-tokens"
    figure = f"{summary['metric'].replace('_', ' ')} {_cell(best, summary['metric'])}"
    low, high = best["perplexity_cost_ci95"]
    yield f"best: {best['run']}, {figure}; chosen perplexity {_cell(best, 'chosen_perplexity')}"
    if best["run"] == best["lowest_perplexity_run"]:
        yield "  which is the lowest of all"
    else:
        yield (
            f"  which is {best['perplexity_cost']:+.1%} ({low:+.1%} to {high:+.1%}) on the lowest, of "
            f"{best['lowest_perplexity_run']}"
        )
    yield f"its recipe: {Path(summary['directory']) / 'best.yaml'}"
