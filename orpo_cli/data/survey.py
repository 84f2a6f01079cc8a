"""One pass over a recipe's rows: what it finds, and where that of a stream is kept for the next run.

    $XDG_CACHE_HOME/orpo/counts/FINGERPRINT.json      (~/.cache/orpo/counts where that is not set)

The fingerprint stands for all that the result depends on: the data's content, the recipe's `data`, the tokenizer, the
template and the versions. A file that holds another, or cannot be read, is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from orpo_cli.data.bitmap import Bitmap
from orpo_cli.data.formats import Drop
from orpo_cli.data.keys import PromptKeys, SeenKeys, pair_key, prompt_key
from orpo_cli.data.pairs import CHUNK_ROWS, PairReader
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.files import make_directory, to_json, write_file
from orpo_cli.recipe.schema import DataSection, Holdout

# While rows are counted, how many is told as often as this.
TELL_SECONDS = 10.0

Tell = Callable[[str], None]


def tell_nobody(line: str) -> None:
    """For a pass that nobody watches."""


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


def count_stream(reader: PairReader, section: DataSection, holdout: Holdout | None, tell: Tell) -> Survey:
    """The pass over a stream, or what it found in an earlier run on the same data."""
    fingerprint = _survey_fingerprint(reader, section, holdout)
    found = kept_survey(fingerprint, [len(source.rows.counts) for source in reader.sources])
    if found is None:
        tell("counting the pairs of a stream; later runs on the same data need not")
        found = count_rows(reader, section, holdout, None, tell)
        keep_survey(found, fingerprint)
        return found
    start = 0
    for source, length, counts in zip(reader.sources, found.lengths, found.counts, strict=True):
        source.start, source.length, source.rows.counts = start, length, counts
        start += length
    return found


def _survey_fingerprint(reader: PairReader, section: DataSection, holdout: Holdout | None) -> str:
    """Stands for all that a survey depends on."""
    counted = ("columns", "filter", "format", "system", "deduplicate", "strict")
    parts = {
        "versions": {name: version(name) for name in ("orpo-cli", "transformers", "tokenizers")},
        "sources": [
            [source.spec.model_dump(mode="json", exclude={"weight"}), source.rows.fingerprint, source.format.name]
            for source in reader.sources
        ],
        "data": section.model_dump(mode="json", include=set(counted)),
        "holdout": holdout and holdout.holdout,
        "tokens": reader.tokenise.fingerprint,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def count_rows(
    reader: PairReader,
    section: DataSection,
    holdout: Holdout | None,
    held: dict[int, TokenizedPair] | None,
    tell: Tell = tell_nobody,
) -> Survey:
    """The pass itself. Places the sources one behind the other, and puts the pairs into `held` if that is given."""
    found, seen, prompts = Survey(), SeenKeys(), PromptKeys()
    told = time.monotonic()
    for source in reader.sources:
        source.start, source.length, of_source = found.rows, None, 0
        for index, pair, result in PairReader([source], section, reader.tokenise).read(found.rows):
            found.rows = index + 1
            if found.rows % CHUNK_ROWS == 0 and time.monotonic() > told + TELL_SECONDS:
                told = time.monotonic()
                tell(f"  {found.rows:,} rows read, {len(found.usable):,} pairs")
            if isinstance(result, TokenizedPair) and section.deduplicate and not seen.add(pair_key(result)):
                result = Drop("duplicate", "the same pair occurred before")
            if isinstance(result, Drop):
                found.dropped[result.reason] += 1
                found.examples.setdefault(result.reason, f"{reader.where(index)}: {result.detail}")
                continue
            of_source += 1
            found.usable.add(index)
            found.truncated += result.truncated
            if held is not None:
                held[index] = result
            if holdout is not None and pair is not None:
                prompts.add(prompt_key(pair), index)
            if of_source == source.spec.max_pairs:
                break
        source.length = found.rows - source.start
        found.lengths.append(source.length)
        found.counts.append(source.rows.counts)
    if holdout is not None:
        found.prompts = len(prompts)
        found.held_out = prompts.first(_wanted_pairs(holdout, len(found.usable)))
    return found


def _wanted_pairs(holdout: Holdout, pairs: int) -> int:
    wanted = holdout.holdout
    return wanted if isinstance(wanted, int) else max(1, round(wanted * pairs))


# What is kept for the next run

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
