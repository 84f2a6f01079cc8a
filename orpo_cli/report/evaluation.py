"""What `orpo eval` found, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from orpo_cli.terminal import number, say, visible

_FIGURES = (
    "accuracy",
    "length_controlled_accuracy",
    "log_odds_ratio",
    "chosen_logps",
    "rejected_logps",
    "chosen_perplexity",
    "rejected_perplexity",
    "nll_loss",
    "or_loss",
    "loss",
)
# Groups of a column that are printed; more are summed up.
_GROUPS = 20


def show(figures: Mapping[str, Any]) -> None:
    """Print the figures of `eval.json`, as far as there are any, to stderr."""
    say(_overall(figures))
    by_length = figures["accuracy_by_length"]
    say(_groups("accuracy where the chosen answer is", {k.removeprefix("chosen_"): v for k, v in by_length.items()}))
    for column, groups in figures.get("slices", {}).items():
        say(_groups(f"by {column}", groups))
    if "answers" in figures:
        say(_diversity(figures["answers"]))
    if "judge" in figures:
        say(_judge(figures["judge"]))
    for sample in figures.get("samples", []):
        say()
        for who in ("prompt", "chosen", "base", "model"):
            if who in sample:
                say(Text(f"{who:>7}  ", style="bold") + Text(visible(sample[who])))


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


def _overall(figures: Mapping[str, Any]) -> Table:
    base, delta = figures.get("base"), figures.get("delta", {})
    table = _table(f"{figures['pairs']:,} pairs", "model", "95 %", *(("base", "delta", "95 %", "p") if base else ()))
    for name in _FIGURES:
        cells = [name.replace("_", " "), number(figures[name]), _interval(figures.get(f"{name}_ci95"))]
        if base:
            p = next((value for key, value in delta.items() if key.startswith(f"{name}_p_")), None)
            cells += [number(base[name]), number(delta.get(name)), _interval(delta.get(f"{name}_ci95")), number(p)]
        table.add_row(*cells)
    return table


def _groups(title: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    """A line a group; of very many, the largest ones, and the others in one line."""
    table = _table(title, "pairs", "accuracy", "95 %", *(("log odds ratio", "95 %") if title.startswith("by ") else ()))
    for column in table.columns[1:]:
        column.no_wrap = True
    if len(groups) > _GROUPS:
        largest = sorted(groups, key=lambda name: -groups[name]["pairs"])
        shown, others = largest[: _GROUPS - 1], largest[_GROUPS - 1 :]
        together = _together([groups[name] for name in others])
        table.title = f"{title}: the largest of {len(groups):,} groups (the JSON has all)"
        groups = {name: groups[name] for name in shown} | {f"{len(others):,} others": together}
    for name, figures in groups.items():
        cells = [
            visible(name),
            f"{figures['pairs']:,}",
            number(figures["accuracy"]),
            _interval(figures.get("accuracy_ci95")),
        ]
        if "log_odds_ratio" in figures:
            cells += [number(figures["log_odds_ratio"]), _interval(figures.get("log_odds_ratio_ci95"))]
        table.add_row(*cells)
    return table


def _together(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pairs and means of some groups as of one, without intervals."""
    pairs = sum(group["pairs"] for group in groups)
    means = {
        name: sum(group["pairs"] * group[name] for group in groups) / pairs for name in ("accuracy", "log_odds_ratio")
    }
    return {"pairs": pairs, **means}


def _diversity(answers: Mapping[str, Any]) -> Table:
    columns = ("ended", "words", "distinct_1", "distinct_2", "distinct_3", "self_bleu")
    table = _table(f"answers to {answers['prompts']:,} prompts", *(column.replace("_", " ") for column in columns))
    for who in ("chosen", "base", "model"):
        if who in answers:
            table.add_row(who, *(number(answers[who].get(column)) for column in columns))
    return table


def _judge(judge: Mapping[str, Any]) -> Table:
    table = _table(f"judged by {judge['model']}", "win rate", "95 %", "wins", "ties", "losses", "p")
    for who in ("chosen", "base"):
        if found := judge.get(f"against_{who}"):
            counts = (f"{found[key]:,}" for key in ("wins", "ties", "losses"))
            table.add_row(
                f"against {who}",
                number(found["win_rate"]),
                _interval(found["win_rate_ci95"]),
                *counts,
                number(found["p_sign"]),
            )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(
            column, justify="left" if column == "95 %" else "right", style="dim" if column == "95 %" else ""
        )
    return table


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else f"{number(ends[0])} to {number(ends[1])}"
