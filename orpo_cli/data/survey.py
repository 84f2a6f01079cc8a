"""What one pass over a recipe's rows has found, and where that of a stream is kept for the next run.

    $XDG_CACHE_HOME/orpo/counts/FINGERPRINT.json      (~/.cache/orpo/counts where that is not set)

The fingerprint stands for all that the result depends on: the data's content, the recipe's `data`, the tokenizer, the
template and the versions. A file that holds another, or cannot be read, is as good as none.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from orpo_cli.data.bitmap import Bitmap
from orpo_cli.files import make_directory, to_json, write_file


@dataclass
class Survey:
    """What the pass has found."""

    rows: int = 0
    lengths: list[int] = field(default_factory=list)
    """Rows of each source."""
    counts: list[list[int | None]] = field(default_factory=list)
    """Rows of each file of each source, None for one that was not read to its end."""
    usable: Bitmap = field(default_factory=Bitmap)
    """Positions of the pairs, duplicates left out, the held-out ones included."""
    held_out: Bitmap = field(default_factory=Bitmap)
    prompts: int = 0
    """Different prompts, if some are to be held out."""
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


_BITMAPS = ("usable", "held_out")


def counts_directory() -> Path:
    """Where surveys are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "orpo" / "counts"


def keep_survey(survey: Survey, fingerprint: str) -> None:
    """Write a survey for later runs; a disk that refuses costs them the pass, and nothing else."""
    fields = {name: value.to_text() if name in _BITMAPS else value for name, value in vars(survey).items()}
    with suppress(OSError):
        make_directory(counts_directory())
        write_file(_file(fingerprint), to_json({"fingerprint": fingerprint, **fields}))


def kept_survey(fingerprint: str, sources: Sequence[int]) -> Survey | None:
    """The survey that was kept under a fingerprint, None if there is none; `sources`: files of each source."""
    try:
        fields = json.loads(_file(fingerprint).read_text(encoding="utf-8"))
        if fields.pop("fingerprint") != fingerprint:
            return None
        bitmaps = {name: Bitmap.from_text(fields[name]) for name in _BITMAPS}
        survey = Survey(**{**fields, **bitmaps, "dropped": Counter(fields["dropped"])})
        sound = list(map(len, survey.counts)) == list(sources) and sum(survey.lengths) == survey.rows
        return survey if sound else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, zlib.error):
        return None


def _file(fingerprint: str) -> Path:
    return counts_directory() / f"{fingerprint}.json"
