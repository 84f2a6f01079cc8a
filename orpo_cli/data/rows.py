"""Rows of files and datasets as one sequence of positions, and the place in the data where each stands."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class SourceSpec(Protocol):
    """What is read of a recipe's source: where its rows are."""

    path: str
    name: str | None
    split: str | None
    revision: str | None
    group_by: str | None


@dataclass(frozen=True)
class BadRow:
    """Stands in the place of a row that could not be read; `detail` says why."""

    detail: str


Row = Mapping[str, Any] | BadRow


Wanted = Callable[[int], bool]


def every_row(offset: int) -> bool:
    """Want all."""
    return True


def no_row(offset: int) -> bool:
    """Want none, and only count them."""
    return False


# Opens a file or dataset afresh and gives its rows from an offset on. In place of those whose offset is not wanted it
# may give None, where that spares it the work of parsing them.
Reader = Callable[[int, Wanted], Iterator[Row | None]]


@dataclass
class Part:
    """One file, or one split of a dataset."""

    source: int  # index of its spec
    name: str
    fingerprint: str
    read: Reader
    count: int | None = None  # None: not known before it was read to its end
    seen: int = 0
    blank_lines: list[int] | None = None  # of JSON lines: the row before which each blank line stands

    def holds(self, offset: int) -> bool:
        """Whether there is a row at the offset; reads up to it where that is not known yet."""
        if self.count is None and offset >= self.seen:
            if any(True for _ in self.read(offset, no_row)):
                self.seen = offset + 1
            else:
                self.rows()
        return offset < (self.seen if self.count is None else self.count)

    def rows(self) -> int:
        """How many rows there are; reads a stream to its end where that is not known yet."""
        if self.count is None:
            self.count = sum(1 for _ in self.read(0, no_row))
        return self.count


class Rows:
    """All sources' rows, one after the other.

    `count` is the number of rows, None when `streamed`; `fingerprint` changes with the data's content.
    """

    def __init__(self, specs: Sequence[SourceSpec], parts: Sequence[Part], streamed: bool) -> None:
        self.specs = tuple(specs)
        self.streamed = streamed
        self._parts = tuple(parts)
        self.count = None if streamed else sum(part.count or 0 for part in parts)
        self.fingerprint = digest(part.fingerprint.encode() for part in parts)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Give the rows from the position `start` on. Every call reads afresh."""
        return (row for _, row in self.numbered(start))

    def numbered(self, start: int = 0, wanted: Wanted = every_row) -> Iterator[tuple[int, Row]]:
        """Give the rows from the position `start` on whose position is wanted, each with it; parse no others."""
        first, offset = self._locate(start)
        base = start - offset
        for part in self._parts[first:]:
            for row in part.read(offset, lambda offset, base=base: wanted(base + offset)):  # type: ignore[misc]
                position = base + offset
                offset += 1
                part.seen = max(part.seen, offset)
                if row is not None and wanted(position):
                    yield position, row
            base += offset
            if part.count is None and offset <= part.seen:
                part.count = part.seen
            offset = 0

    def heads(self, limit: int) -> list[list[Mapping[str, Any]]]:
        """Return the first readable rows of each source, at most `limit` of them."""
        heads: list[list[Mapping[str, Any]]] = [[] for _ in self.specs]
        for index, head in enumerate(heads):
            rows = itertools.chain.from_iterable(
                part.read(0, every_row) for part in self._parts if part.source == index
            )
            head += itertools.islice((row for row in rows if isinstance(row, Mapping)), limit)
        return heads

    def bounds(self) -> list[tuple[int, int]]:
        """Return each source's first position and the one after its last; reads a stream to its end."""
        sizes = [0] * len(self.specs)
        for part in self._parts:
            sizes[part.source] += part.rows()
        ends = list(itertools.accumulate(sizes))
        return list(zip([0, *ends], ends, strict=False))

    def source(self, position: int) -> int:
        """Return the index of the source that holds the position."""
        return self._parts[self._locate(position)[0]].source

    def spec(self, position: int) -> SourceSpec:
        """Return the spec of the source that holds the position."""
        return self.specs[self.source(position)]

    def where(self, position: int) -> str:
        """Say where a position is: file or dataset, row (0-based), and for JSON lines the line (1-based)."""
        index, row = self._locate(position)
        part = self._parts[index]
        return f"{part.name}, {row_in_file(row, part.blank_lines)}"

    @property
    def counts(self) -> list[int | None]:
        """Rows of each file or split, None for a stream that was not read to its end."""
        return [part.count for part in self._parts]

    @counts.setter
    def counts(self, counts: Sequence[int | None]) -> None:
        """Take over what another reading of the same data has counted."""
        for part, count in zip(self._parts, counts, strict=True):
            part.count = count if part.count is None else part.count

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the index of the part that holds the position, the last one if none does, and the offset in it."""
        last = len(self._parts) - 1
        for index, part in enumerate(self._parts):
            if index == last or part.holds(position):
                return index, position
            position -= part.count or 0
        raise AssertionError("there is always a part")


def row_in_file(row: int, blank_lines: list[int] | None) -> str:
    """Say which row (from 0) it is, and of JSON lines, where blank ones stand before these rows, the line (from 1)."""
    return f"row {row}" if blank_lines is None else f"row {row} (line {row + 1 + bisect.bisect(blank_lines, row)})"


def digest(parts: Iterable[bytes]) -> str:
    """Return the sha256 of several texts."""
    return hashlib.sha256(b"\n".join(parts)).hexdigest()
