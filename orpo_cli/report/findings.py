"""What `orpo data` shows on stdout: the figures of a set, its findings with examples, pairs token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_cli.terminal import Pieces, pair_lines, size_of_set, visible

console = Console(highlight=False, soft_wrap=True)
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def show(summary: Mapping[str, Any]) -> None:
    """Print everything that was counted but the warnings."""
    _line(f"template: {summary['template']}, a turn ends with {visible(summary['end_of_turn'])}")
    if summary["added_tokens"]:
        _line(f"  tokens added to the vocabulary: {' '.join(summary['added_tokens'])}")
    for name, title in (("train", "training"), ("eval", "held-out")):
        if summary[name]:
            of_training = name == "eval" and summary["train"]["held_out"] > 0
            _show_set(title, summary[name], summary, of_training=of_training)
        else:
            _heading(f"{title}: none (data.eval)")
    if overlap := summary["overlap"]:
        _heading("overlap of the two")
        _line(
            f"  {overlap['prompts']:,} held-out pairs have a prompt that is trained on, "
            f"{overlap['pairs']:,} with the same answers"
        )
        _examples(overlap["examples"], "is also")


def show_pair(where: str, pieces: Pieces) -> None:
    """Print a pair token by token; the brackets name the parts of the loss, `context` being in none."""
    _heading(visible(where))
    for line in pair_lines(pieces):
        console.print(line)


def _show_set(title: str, found: Mapping[str, Any], summary: Mapping[str, Any], *, of_training: bool) -> None:
    dropped = sum(found["dropped"].values())
    size = size_of_set(found["pairs"], found["rows"], found["held_out"], of_training=of_training)
    _heading(f"{title}: {size}" + ("" if of_training else f", {dropped:,} dropped"))
    for source in found["sources"]:
        _line(f"  {source['path']}: format {source['format']} ({source['why']})")
    for reason, count in found["dropped"].items():
        _line(f"  {count:,} {reason}, e.g. {visible(found['dropped_examples'][reason])}")
    _lengths(found)
    _policies(found, summary)
    bias = found["length_bias"]
    if bias["share"] is not None:
        low, high = bias["share_ci95"]
        _line(
            f"  the longer answer is the chosen one in {bias['share']:.1%} ({low:.1%} to {high:.1%}) of "
            f"{bias['chosen_longer'] + bias['rejected_longer']:,} pairs; in {bias['equal']:,} both are as long"
        )
    duplicates = found["duplicates"]
    _finding(duplicates, "occurred before", found, "again")
    _line(f"  {duplicates['prompts']:,} have a prompt that occurred before")
    _line(f"  {duplicates['swapped']:,} contradict another, which has the same answers the other way round")
    _examples(duplicates["swapped_examples"], "against")
    _finding(found["alike"], "have answers that hardly differ", found)
    _finding(found["templated"], "hold a text that is templated already", found)
    _finding(found["repeats_prompt"], "have an answer that begins with the prompt", found)
    _finding(found["special_tokens"], "hold what looks like special tokens", found)
    _finding(found["odd_unicode"], "hold odd characters", found)


def _lengths(found: Mapping[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("  tokens, of whole pairs")
    for name in _COLUMNS:
        table.add_column(f"{name[1:]} %" if name.startswith("p") else name, justify="right")
    for name, title in (
        ("prompt", "  prompt"),
        ("chosen", "  chosen"),
        ("rejected", "  rejected"),
        ("pair", "  prompt + longer answer"),
    ):
        values = found["tokens"][name]
        table.add_row(title, *("-" if values[c] is None else f"{values[c]:,.0f}" for c in _COLUMNS))
    console.print(table)


def _policies(found: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    tokens, limit = found["tokens"]["pair"], f"max_length {summary['max_length']:,}"
    if summary["max_prompt_length"] is not None:
        limit += f", max_prompt_length {summary['max_prompt_length']:,}"
    _line(f"  at {limit}, if data.overlong were (it is {summary['overlong']}):")
    for policy, counts in found["overlong"].items():
        _line(
            f"    {policy}: {counts['whole']:,} whole, {counts['truncated']:,} truncated, {counts['dropped']:,} dropped"
        )
    overlong = found["overlong"]["drop"]["dropped"]
    _line(f"    error: {f'stops at the first of {overlong:,}' if overlong else 'none is too long'}")
    _line(
        f"  a max_length of {tokens['p90']:,} keeps 90 % of the pairs whole, "
        f"{tokens['p95']:,} 95 %, {tokens['p99']:,} 99 %, {tokens['max']:,} all"
    )


def _finding(finding: Mapping[str, Any], what: str, found: Mapping[str, Any], then: str = "") -> None:
    count = finding["pairs"]
    names = ", ".join(f"{visible(name)} {number:,}" for name, number in list(finding.get("names", {}).items())[:8])
    share = f" ({count / found['pairs']:.1%})" if count else ""
    _line(f"  {count:,}{share} {what}{f': {names}' if names else ''}")
    _examples(finding["examples"], then)


def _examples(examples: list[dict[str, str]], then: str) -> None:
    for example in examples:
        _line(f"    {visible(example['row'])}{f' {then} ' if then else ': '}{visible(example['what'])}")


def _heading(text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _line(text: str) -> None:
    console.print(Text(text))
