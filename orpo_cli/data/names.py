"""What a source of the recipe names: a path or a hub dataset, one split or a slice; and what may have been meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from orpo_cli.data.readers import kind_of
from orpo_cli.data.rows import SourceSpec
from orpo_cli.errors import DataError


def is_hub_id(path: str) -> bool:
    """Whether it reads like owner/name, and not like a file."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None and kind_of(Path(path)) is None


def is_sliced(split: str | None) -> bool:
    """Whether it is more than a split's name: a slice, or a sum."""
    return split is not None and not re.fullmatch(r"[\w.-]+", split)


def choose_split(names: Sequence[str], spec: SourceSpec, usual: Sequence[str]) -> str:
    """Return the wanted split, else the first usual one, else the only one.

    Slices and sums (`train[:100]+test`) are left to `datasets`.
    """
    choices = f"its splits are {', '.join(names)}"
    if spec.split is not None:
        for name in re.split(r"\s*\+\s*", spec.split):
            if name.split("[")[0] not in names:
                raise DataError(f"{spec.path} has no split {name!r}", choices)
        return spec.split
    if found := [name for name in usual if name in names] or (list(names) if len(names) == 1 else []):
        return found[0]
    raise DataError(
        f"{spec.path} has several splits, and none is called {' or '.join(usual)}", f"set `split`; {choices}"
    )


def nearest(path: Path) -> str:
    """Suggest what may have been meant by a path that is not there."""
    there = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(entry.name for entry in there.iterdir())
    missing = path.relative_to(there).parts[0]
    if close := difflib.get_close_matches(missing, names, n=3, cutoff=0.5):
        return "nearest: " + ", ".join(str(there / name) for name in close)
    return f"{there.resolve()} holds nothing like {missing}; a hub dataset is named owner/name"
