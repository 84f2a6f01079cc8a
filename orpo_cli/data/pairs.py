"""A recipe's sources -> its pairs, in source order: each opened, its format recognised, its rows read and tokenised."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from orpo_cli.data.bitmap import Bitmap
from orpo_cli.data.formats import Drop, Format, Pair, check_filters, passes, read_pair, recognise, with_system
from orpo_cli.data.rows import BadRow, Row, Rows
from orpo_cli.data.sources import open_source
from orpo_cli.data.tokenize import PairTokenizer, TokenizedPair
from orpo_cli.errors import DataError
from orpo_cli.recipe.gather import Faults
from orpo_cli.recipe.schema import DataSection, SourceSpec

# Rows that decide which format a source has.
_PEEK_ROWS = 64
# Rows that are tokenised in one call.
CHUNK_ROWS = 256
# Of a source of `data.train` that has several splits and names none, the first of these that is there.
TRAINING_SPLITS = ("train", "train_prefs")
# Of a source of `data.eval` that has several splits and names none, the first of these that is there.
HELD_OUT_SPLITS = ("test", "validation", "test_prefs")


@dataclass
class Source:
    """One entry of `data.train` or `data.eval`, opened and recognised."""

    spec: SourceSpec
    rows: Rows
    format: Format
    columns: dict[str, str]
    start: int = 0
    """Position of its first row among the rows of all sources."""
    length: int | None = None
    """Rows of it that are read; None: all, as long as nothing has counted them."""


def open_sources(
    specs: Sequence[SourceSpec], section: DataSection, usual_splits: tuple[str, ...] = TRAINING_SPLITS
) -> list[Source]:
    """Open every source and recognise its format from its first rows. Raises DataError.

    `usual_splits` are those to take, the first that is there, of a source that has several and names none.
    """
    sources = []
    for spec in specs:
        rows = open_source([spec], section.streaming, usual_splits)
        columns = {str(ours): theirs for ours, theirs in [*section.columns.items(), *spec.columns.items()]}
        [first] = rows.heads(_PEEK_ROWS)
        if not first:
            raise DataError(f"{spec.path} has no readable row", "see data.train and data.eval")
        check_filters(first, [*section.filter, *spec.filter])
        sources.append(Source(spec, rows, recognise(first, columns, section.format), columns))
    return sources


@dataclass
class Sources:
    """A recipe's sources: those of `data.train` and of `data.eval`, none where pairs of the former are held out."""

    train: list[Source]
    eval: list[Source]


def open_data(section: DataSection, faults: Faults) -> Sources:
    """Open every source of a recipe; those that cannot be opened are noted, and left out."""

    def opened(name: str, specs: Sequence[SourceSpec], usual_splits: tuple[str, ...]) -> list[Source]:
        sources = []
        for number, spec in enumerate(specs):
            with faults.at(f"data.{name}.{number}.path"):
                sources += open_sources([spec], section, usual_splits)
        return sources

    held_out = section.eval if isinstance(section.eval, list) else []
    return Sources(opened("train", section.train, TRAINING_SPLITS), opened("eval", held_out, HELD_OUT_SPLITS))


class PairReader:
    """Reads the rows of some sources, one behind the other, as tokenised pairs."""

    def __init__(
        self,
        sources: list[Source],
        section: DataSection,
        tokenise: PairTokenizer,
        known: Mapping[int, TokenizedPair] | None = None,
    ) -> None:
        """`known` are pairs, by position, that need not be tokenised again."""
        self.sources = sources
        self.section = section
        self.tokenise = tokenise
        self.known = known or {}

    @property
    def streamed(self) -> bool:
        """Whether any source is read anew for every block."""
        return any(source.rows.streamed for source in self.sources)

    def read(
        self, start: int = 0, only: Bitmap | None = None
    ) -> Iterator[tuple[int, Pair | None, TokenizedPair | Drop]]:
        """From row `start` on: each row's position, its pair as text, and its tokens or why it is dropped.

        As `texts` and `tokens`.
        """
        rows = self.texts(start, only)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield from self.tokens(chunk)

    def texts(self, start: int = 0, only: Bitmap | None = None) -> Iterator[tuple[int, Pair | Drop]]:
        """From row `start` on: each row's position, and its pair or why it is dropped.

        `only`: rows to read of sources that have been counted; the others are passed over without being parsed.
        """
        for source in self.sources:
            first = max(source.start, start)
            count = None if source.length is None else max(0, source.start + source.length - first)
            if only is not None:
                assert count is not None
                count = only.count(first, first + count)
            for index, row in islice(_numbered(source, first, only), count):
                yield index, self._pair(source, row)

    def tokens(
        self, rows: Sequence[tuple[int, Pair | Drop]]
    ) -> Iterator[tuple[int, Pair | None, TokenizedPair | Drop]]:
        """Each row's position, its pair as text, and its tokens or why it is dropped.

        Raises DataError at the first malformed row under `data.strict`.
        """
        unknown = [(i, pair) for i, pair in rows if isinstance(pair, Pair) and i not in self.known]
        tokenised = iter(self.tokenise.batch(unknown))
        for index, pair in rows:
            result = pair if isinstance(pair, Drop) else self.known.get(index) or next(tokenised)
            if isinstance(result, Drop) and result.reason == "malformed" and self.section.strict:
                raise DataError(f"{self.where(index)}: {result.detail}", "correct the row, or set data.strict: false")
            yield index, pair if isinstance(pair, Pair) else None, result

    def rows_at(self, positions: Collection[int]) -> Iterator[tuple[int, Mapping[str, Any], Pair]]:
        """The usable ones of some rows of counted sources, in source order: position, the row as it is, its pair."""
        for source in self.sources:
            assert source.length is not None
            own = {index for index in positions if source.start <= index < source.start + source.length}
            for index, row in islice(_numbered(source, source.start, own), len(own)):
                pair = self._pair(source, row)
                if isinstance(pair, Pair) and not isinstance(row, BadRow):
                    yield index, row, pair

    def where(self, index: int) -> str:
        """File and row of a position, for messages."""
        source = [source for source in self.sources if source.start <= index][-1]
        return source.rows.where(index - source.start)

    def _pair(self, source: Source, row: Any) -> Pair | Drop:
        if isinstance(row, BadRow):
            return Drop("malformed", row.detail)
        try:
            if not passes(row, [*self.section.filter, *source.spec.filter]):
                return Drop("filtered", "it does not meet the filter")
            pair = read_pair(row, source.format, source.columns)
        except Drop as drop:
            return drop
        return with_system(pair, self.section.system) if self.section.system else pair


def _numbered(source: Source, first: int, only: Container[int] | Bitmap | None) -> Iterator[tuple[int, Row]]:
    """A source's rows from position `first` on, each with its position; of `only`, those that are in it."""
    if only is None:
        return enumerate(source.rows.rows(first - source.start), first)
    rows = source.rows.numbered(first - source.start, lambda row: source.start + row in only)
    return ((source.start + row, content) for row, content in rows)
