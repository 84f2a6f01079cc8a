"""A column's name -> its value in a row: a dot reaches into nested values, brackets choose from a list by a number."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

Row = Mapping[str, Any]

MISSING: Any = object()
"""In place of a value that a row has not."""
TIED: Any = object()
"""In place of the best of some items where no two differ."""


def lookup(row: Any, column: str) -> Any:
    """Return a column's value, or `MISSING`.

    A dot reaches into nested values. `answers[max score]` is the item of a list that has the highest score, `min` the
    lowest; `TIED` where no two items differ in it.
    """
    if isinstance(row, Mapping) and column in row:
        return row[column]
    value: Any = row
    for step in _steps(column):
        value = _best(value, *step) if isinstance(step, tuple) else _member(value, step)
        if value is MISSING or value is TIED:
            break
    return value


@cache
def _steps(column: str) -> tuple[str | tuple[str, str], ...]:
    """Part "a.b[max c.d].e" into "a", "b", ("max", "c.d"), "e"."""
    steps: list[str | tuple[str, str]] = []
    for name in re.split(r"\.(?![^\[]*\])", column):
        if match := re.fullmatch(r"(.+)\[(max|min) (.+)\]", name):
            steps += [match[1], (match[2], match[3])]
        else:
            steps.append(name)
    return tuple(steps)


def _member(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name, MISSING)
    if isinstance(value, (list, tuple)) and re.fullmatch(r"-?\d+", name):
        return value[int(name)] if -len(value) <= int(name) < len(value) else MISSING
    return MISSING


def _best(values: Any, which: str, column: str) -> Any:
    """Return the first item with the highest or lowest number in a column; those without a number do not count."""
    if not isinstance(values, (list, tuple)):
        return MISSING
    rated = [(number, item) for item in values if (number := as_number(lookup(item, column))) is not None]
    if not rated:
        return MISSING
    numbers = [number for number, _ in rated]
    if min(numbers) == max(numbers):
        return TIED
    return rated[numbers.index(max(numbers) if which == "max" else min(numbers))][1]


def as_number(value: Any) -> float | None:
    """Return a number, which may be written as a text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value else None


def in_our_names(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the row under our names, as `columns` maps them to its own."""
    if not columns:
        return row
    mapped = {ours: lookup(row, theirs) for ours, theirs in columns.items()}
    kept = {column: value for column, value in row.items() if column not in mapped}
    return kept | {ours: value for ours, value in mapped.items() if value is not MISSING}


def is_null(value: Any) -> bool:
    """Whether a value is null, or none at all."""
    return value is None or value is MISSING or value is TIED or _is_nan(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def described(value: Any) -> str:
    """Say what was found in a value's place."""
    if value is MISSING:
        return "missing"
    if value is TIED:
        return "one of several that are rated alike"
    if value is None or _is_nan(value):
        return "null"
    kinds = ((bool, "a boolean"), ((int, float), "a number"), (str, "a text"), (Mapping, "an object"))
    kind = next((name for types, name in kinds if isinstance(value, types)), None)
    if kind is None:
        kind = "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 40 else shown[:37] + '...'})"
