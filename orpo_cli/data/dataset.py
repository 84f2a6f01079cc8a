"""Rows -> the pairs of a run: one pass that counts and splits, then pairs in an order that is a pure function.

Held in memory, every pair is tokenised once, in that pass. Streamed, the pass only counts, and a block of rows at a
time is read and tokenised again when its turn comes. `data.deduplicate`, `max_pairs` and `holdout` are settled by the
pass in source order, so that they come out the same in either mode, for every seed and after every resume. What the
pass over a stream has found is one bit a row and a few numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from orpo_cli.data.advice import wrong_values
from orpo_cli.data.bitmap import Bitmap
from orpo_cli.data.formats import (
    Drop,
    Pair,
    show_row,
)
from orpo_cli.data.order import BLOCK_ROWS, Position, block_order, permutation, quotas, turns
from orpo_cli.data.pairs import CHUNK_ROWS, HELD_OUT_SPLITS, PairReader, Sources, open_sources
from orpo_cli.data.survey import Survey, Tell, count_rows, count_stream, tell_nobody
from orpo_cli.data.tokenize import PairTokenizer, TokenizedPair
from orpo_cli.errors import DataError, RunError
from orpo_cli.recipe.schema import DataSection, Holdout, SourceSpec, TrainSection

# Rows of an uncounted stream after which the share of dropped ones is judged, at the latest at the end of a block.
_JUDGED_ROWS = 1024
DROP_REASONS = ("empty", "identical", "diverged", "overlong", "malformed", "filtered", "duplicate")
# Dropped on purpose, not for a fault of the data: these do not count towards `data.max_dropped`.
_WANTED_DROPS = ("filtered", "duplicate")


# A row's position and its text; None where its tokens are held.
Unread = tuple[int, Pair | Drop | None]


@dataclass
class PairSet:
    """The pairs of one split. `rows` and `pairs` are None for a stream that was not counted."""

    reader: PairReader
    rows: int | None = None
    pairs: int | None = None
    held: dict[int, TokenizedPair] | None = None
    """All pairs by position; None when they are streamed."""
    usable: Bitmap | None = None
    """Positions of the pairs in this set; None for a stream that was not counted, where every pair is."""
    quotas: list[int] | None = None
    """Pairs of each source in an epoch, where there are several to train on."""
    truncated: int = 0
    """How many of the pairs were truncated to fit."""
    held_out: int = 0
    """How many pairs of these rows are in the held-out set instead."""
    dropped: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    """Rows of an uncounted stream that have been read so far, each once."""
    begun_late: bool = False
    """Whether reading began behind the start: what an uncounted stream has there, this process cannot tell."""
    _counted: set[int] = field(default_factory=set)
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason of dropping, where the first such row stands and what is wrong with it."""

    def in_source_order(self) -> list[TokenizedPair]:
        """All pairs; only for a set that is held."""
        assert self.held is not None
        return [self.held[index] for index in sorted(self.held)]

    def first(self) -> TokenizedPair:
        """The first pair in source order. Raises DataError if there is none."""
        if self.held is not None:
            return next(iter(self.in_source_order()))
        for index, _, result in self.reader.read():
            if isinstance(result, TokenizedPair) and self.includes(index):
                return result
        raise _no_usable_pair(self)

    def includes(self, index: int) -> bool:
        """Whether the pair at a position is in this set, and not a duplicate or held out."""
        return self.usable is None or index in self.usable

    def total_pairs(self, train: TrainSection) -> int | None:
        """Pairs that the whole run trains on, repeats counted; None where `max_steps` decides."""
        if train.max_steps is not None:
            return None
        assert self.pairs is not None
        return max(1, round(self.pairs * train.num_train_epochs))

    def total_steps(self, train: TrainSection) -> int:
        """Optimizer steps of the whole run."""
        total = self.total_pairs(train)
        if total is None:
            assert train.max_steps is not None
            return train.max_steps
        return math.ceil(total / train.batch_size)

    def epochs(self, position: Position, pairs_seen: int) -> float:
        """How many epochs lie behind; whole ones only for a stream of unknown length."""
        return pairs_seen / self.pairs if self.pairs else float(position.epoch)

    def steps(
        self, batch_size: int, *, seed: int, shuffle: bool, start: Position, total_pairs: int | None
    ) -> Iterator[tuple[list[TokenizedPair], Position]]:
        """Each optimizer step's pairs, `batch_size` of them (the last step: what is left), and the position after.

        An epoch's last pairs and the next one's first share a step, so that all steps weigh the same.
        """
        stream = islice(self.in_order(seed=seed, shuffle=shuffle, start=start), total_pairs)
        while step := list(islice(stream, batch_size)):
            yield [pair for pair, _ in step], step[-1][1]

    def in_order(self, *, seed: int, shuffle: bool, start: Position) -> Iterator[tuple[TokenizedPair, Position]]:
        """Pairs from a position on, epoch after epoch without end, each with the position after it."""
        self.begun_late |= start != Position()
        if self.quotas is not None:
            yield from self._mixed(seed=seed, shuffle=shuffle, start=start)
            return
        epoch, offset = start.epoch, start.offset
        while True:
            found = False
            for number, first, block in self._blocks(offset):
                order = block_order(len(block), seed=seed, epoch=epoch, block=number, shuffle=shuffle)
                places = range(max(0, offset - first), len(block))
                uncounted = self.rows is None and number not in self._counted
                for place, pair in zip(places, self._pairs(block, order[places.start :], uncounted), strict=True):
                    if pair is not None:
                        found = True
                        yield pair, Position(epoch, first + place + 1)
                self._counted.add(number)
            if not found and offset == 0:
                raise _no_usable_pair(self)
            epoch, offset = epoch + 1, 0

    def _blocks(self, offset: int) -> Iterator[tuple[int, int, list[Unread]]]:
        """Blocks of rows from the one with row `offset` on: number, first row, and the rows.

        What is held in memory is one block, so that the whole set is shuffled at once.
        """
        if self.held is not None:
            assert self.rows is not None
            yield 0, 0, [(index, None) for index in range(self.rows)]
            return
        number = offset // BLOCK_ROWS
        rows = self.reader.texts(number * BLOCK_ROWS)
        while block := list[Unread](islice(rows, BLOCK_ROWS)):
            yield number, number * BLOCK_ROWS, block
            number += 1

    def _pairs(
        self, block: Sequence[Unread], order: Sequence[int] | np.ndarray, uncounted: bool = False
    ) -> Iterator[TokenizedPair | None]:
        """The pair of each row of a block in this order, None for one that is not in the set.

        Rows of a stream are tokenised some at a time, so that a step waits for no more than these.
        """
        rows = (block[place] for place in order)
        if self.held is not None:
            yield from (self.held.get(index) for index, _ in rows)
            return
        done = 0
        while chunk := [(index, text) for index, text in islice(rows, CHUNK_ROWS) if text is not None]:
            results = [(index, result) for index, _, result in self.reader.tokens(chunk)]
            done += len(chunk)
            if uncounted:
                self._count(results, is_last=done == len(order))
            for index, result in results:
                yield result if isinstance(result, TokenizedPair) and self.includes(index) else None

    def _count(self, results: Sequence[tuple[int, TokenizedPair | Drop]], *, is_last: bool) -> None:
        """Count what is dropped from, or truncated in, rows of a stream that no pass has counted.

        Raises DataError once a block, or enough rows to judge by, have too many that are dropped.
        """
        self.rows_read += len(results)
        for index, result in results:
            if isinstance(result, Drop):
                self.dropped[result.reason] += 1
                self.examples.setdefault(result.reason, f"{self.reader.where(index)}: {result.detail}")
            else:
                self.truncated += result.truncated
        # If there is no pair at all, that is told elsewhere.
        if (is_last or self.rows_read >= _JUDGED_ROWS) and self.rows_read > sum(self.dropped.values()):
            _check_dropped_share(self)

    # Several sources

    @property
    def sizes(self) -> list[int] | None:
        """Pairs of each source in this set; None for a stream that was not counted."""
        if self.usable is None:
            return None
        return [self.usable.count(s.start, s.start + (s.length or 0)) for s in self.reader.sources]

    def _mixed(self, *, seed: int, shuffle: bool, start: Position) -> Iterator[tuple[TokenizedPair, Position]]:
        """As `in_order`, of several sources: every block takes from each what is its turn (`order.turns`).

        What is held in memory is one block, and each pass over a source then has an order of its own.
        """
        numbers = self.quotas
        assert numbers is not None
        blocks = -(-sum(numbers) // BLOCK_ROWS) if self.held is None else 1
        streams: list[Iterator[Unread]] | None = None
        epoch, offset = start.epoch, start.offset
        while True:
            first = 0
            for number in range(blocks):
                parts = [turns(quota, epoch=epoch, block=number, blocks=blocks) for quota in numbers]
                length = sum(map(len, parts))
                if first + length > offset:
                    streams = streams or [
                        self._passes(source, part.start, seed=seed, shuffle=shuffle)
                        for source, part in enumerate(parts)
                    ]
                    block = [row for rows, part in zip(streams, parts, strict=True) for row in islice(rows, len(part))]
                    order = block_order(length, seed=seed, epoch=epoch, block=number, shuffle=shuffle)
                    places = range(max(0, offset - first), length)
                    for place, pair in zip(places, self._pairs(block, order[places.start :]), strict=True):
                        if pair is not None:
                            yield pair, Position(epoch, first + place + 1)
                first += length
            epoch, offset = epoch + 1, 0

    def _passes(self, number: int, start: int, *, seed: int, shuffle: bool) -> Iterator[Unread]:
        """A source's pairs, pass after pass without end, from the one at `start` of that sequence on."""
        sizes, source = self.sizes, self.reader.sources[number]
        assert sizes is not None
        assert self.usable is not None
        size = sizes[number]
        passes, offset = divmod(start, size) if size else (0, 0)
        if self.held is not None:
            positions = list(self.usable.within(source.start, source.start + (source.length or 0)))
            while size:
                order = permutation(size, seed, number, passes, 0) if shuffle else range(size)
                yield from ((positions[place], None) for place in order[offset:])
                passes, offset = passes + 1, 0
        reader = PairReader([source], self.reader.section, self.reader.tokenise)
        while size:
            found = 0
            for index, text in reader.texts(self.usable.nth(offset, source.start), self.usable):
                found += 1
                yield index, text
            if found != size - offset:
                raise RunError(f"{source.spec.path} has changed while it was read", "start anew with data that stays")
            offset = 0

    @property
    def dropped_share(self) -> float:
        """Share of the rows that were dropped for a fault; those that were dropped on purpose do not count."""
        faulty, rows = faulty_rows(self.dropped, self.rows or self.rows_read)
        return faulty / rows if rows else 0.0

    def drop_lines(self) -> list[str]:
        """For each reason of dropping: how many rows, and the first of them."""
        return [f"{count:,} {reason}, e.g. {self.examples[reason]}" for reason, count in sorted(self.dropped.items())]

    @property
    def fingerprint(self) -> str:
        """Changes with the content of the sources."""
        return "+".join(source.rows.fingerprint for source in self.reader.sources)

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the set; None for counts of a stream that was not read from its start."""
        known = self.rows is not None or (self.rows_read > 0 and not self.begun_late)
        weighted = any(source.spec.weight for source in self.reader.sources)
        numbers = self.quotas if weighted and self.quotas else [None for _ in self.reader.sources]
        sizes: Sequence[int | None] = self.sizes or [None]  # a single source, if it was not counted
        return {
            "sources": [
                {
                    **{k: v for k, v in source.spec.model_dump(mode="json").items() if v},
                    "fingerprint": source.rows.fingerprint,
                    "format": source.format.name,
                    "streamed": source.rows.streamed,
                    "rows": source.length,
                    "pairs": size,
                    **({"pairs_per_epoch": number} if number is not None else {}),
                }
                for source, size, number in zip(self.reader.sources, sizes, numbers, strict=True)
            ],
            "rows": (self.rows or self.rows_read) if known else None,
            "pairs": self.pairs,
            "truncated": self.truncated if known else None,
            "dropped": dict(sorted(self.dropped.items())) if known else None,
        }


def load_pairs(
    section: DataSection,
    tokenise: PairTokenizer,
    train: TrainSection,
    tell: Tell = tell_nobody,
    sources: Sources | None = None,
) -> tuple[PairSet, PairSet | None]:
    """The training set and the held-out set of a recipe, None if it has none. `tell` hears how far a long pass is.

    `sources` are those of the recipe, if they have been opened. Raises DataError when nothing usable is left, or more
    is dropped than `data.max_dropped` allows.
    """
    training_sources = open_sources(section.train, section) if sources is None else sources.train
    reader = PairReader(training_sources, section, tokenise)
    holdout = section.eval if isinstance(section.eval, Holdout) else None
    single_pass = train.max_steps is not None and len(section.train) == 1 and section.train[0].max_pairs is None
    if reader.streamed and single_pass and holdout is None and not section.deduplicate:
        training, held_out = PairSet(reader), None  # nothing needs to be known of the whole before it is read
        training.first()
    else:
        training, held_out = survey(reader, section, holdout, tell=tell)
        if len(reader.sources) > 1:
            training.quotas = _quotas(training)
    if section.eval is not None and not isinstance(section.eval, Holdout):
        held_out = load_eval_pairs(section, section.eval, tokenise, tell, sources)
    return training, held_out


def load_eval_pairs(
    section: DataSection,
    specs: Sequence[SourceSpec],
    tokenise: PairTokenizer,
    tell: Tell = tell_nobody,
    sources: Sources | None = None,
) -> PairSet:
    """A held-out set of its own, kept in memory."""
    opened = open_sources(specs, section, HELD_OUT_SPLITS) if sources is None else sources.eval
    reader = PairReader(opened, section, tokenise)
    pairs, _ = survey(reader, section, None, keep=True, tell=tell)
    return pairs


def load_held_out(
    section: DataSection, tokenise: PairTokenizer, train: TrainSection, tell: Tell = tell_nobody
) -> PairSet:
    """The held-out set alone. Raises DataError if the recipe names none."""
    if section.eval is None:
        raise DataError("the recipe has no held-out data", "give --data, or set data.eval")
    if not isinstance(section.eval, Holdout):
        return load_eval_pairs(section, section.eval, tokenise, tell)
    _, held_out = load_pairs(section, tokenise, train, tell)
    assert held_out is not None
    return held_out


def survey(
    reader: PairReader,
    section: DataSection,
    holdout: Holdout | None,
    *,
    keep: bool | None = None,
    tell: Tell = tell_nobody,
) -> tuple[PairSet, PairSet | None]:
    """Read everything once: count, drop, deduplicate, limit, and split by prompt. A stream is so read once for good.

    `keep`: hold the pairs in memory; None: unless a source is streamed. Raises DataError as `load_pairs` does.
    """
    held: dict[int, TokenizedPair] | None = {} if keep or (keep is None and not reader.streamed) else None
    if held is None:
        found = count_stream(reader, section, holdout, tell)
    else:
        found = count_rows(reader, section, holdout, held, tell)
    pairs = PairSet(
        reader,
        rows=found.rows,
        pairs=len(found.usable),
        held=held,
        usable=found.usable,
        truncated=found.truncated,
        dropped=found.dropped,
        examples=found.examples,
    )
    _check_dropped(pairs)
    return (pairs, None) if holdout is None else _hold_out(pairs, found, holdout)


def faulty_rows(dropped: Mapping[str, int], rows: int) -> tuple[int, int]:
    """How many rows were dropped for a fault, and of how many: without those that were dropped on purpose."""
    wanted = sum(dropped.get(reason, 0) for reason in _WANTED_DROPS)
    return sum(dropped.values()) - wanted, rows - wanted


def _quotas(pairs: PairSet) -> list[int]:
    """Pairs of each source in an epoch. Raises DataError where a source cannot have its weight."""
    specs, sizes = [source.spec for source in pairs.reader.sources], pairs.sizes
    assert sizes is not None
    weights = [spec.weight for spec in specs if spec.weight is not None]
    numbers = quotas(sizes, weights or None)
    for spec, size, number in zip(specs, sizes, numbers, strict=True):
        if weights and not (size and number):
            raise DataError(
                f"{spec.path} has the weight {spec.weight:g} and "
                + ("no usable pair" if not size else f"would come in none of {sum(sizes):,} pairs of an epoch"),
                "remove the source" if not size else "raise its weight, or remove the source",
            )
    return numbers


def _hold_out(pairs: PairSet, found: Survey, holdout: Holdout) -> tuple[PairSet, PairSet]:
    """Move whole prompts, in the order of their hashes, until the held-out set has its number of pairs.

    The hashes know no seed, so that every run on the same data is judged on the same pairs.
    """
    assert pairs.pairs is not None
    assert pairs.usable is not None
    taken = found.held_out
    if len(taken) in (0, pairs.pairs):
        raise DataError(
            f"data.eval.holdout: {holdout.holdout} leaves nothing to {'train' if taken else 'evaluate'} on: there are "
            f"{pairs.pairs} pairs of {found.prompts} prompts",
            "hold out less, or give data.eval a source of its own",
        )
    if pairs.held is not None:
        held = {index: pairs.held.pop(index) for index in taken}
    else:
        results = ((index, result) for index, _, result in pairs.reader.read(only=taken))
        held = {index: result for index, result in results if isinstance(result, TokenizedPair)}
    pairs.usable.remove(taken)
    truncated = sum(pair.truncated for pair in held.values())
    pairs.pairs, pairs.truncated, pairs.held_out = pairs.pairs - len(held), pairs.truncated - truncated, len(held)
    return pairs, PairSet(pairs.reader, rows=pairs.rows, pairs=len(held), held=held, usable=taken, truncated=truncated)


def _check_dropped(pairs: PairSet) -> None:
    if not pairs.pairs:
        raise _no_usable_pair(pairs)
    _check_dropped_share(pairs)


def _check_dropped_share(pairs: PairSet) -> None:
    share, allowed = pairs.dropped_share, pairs.reader.section.max_dropped
    if share > allowed:
        _, rows = faulty_rows(pairs.dropped, pairs.rows or pairs.rows_read)
        raise DataError(
            f"{share:.0%} of {rows:,} rows were dropped, above data.max_dropped: {allowed}\n"
            + "\n".join(f"  {line}" for line in pairs.drop_lines()),
            "mend the data or the recipe (data.max_length, data.columns), or raise data.max_dropped",
        )


def _no_usable_pair(pairs: PairSet) -> DataError:
    """Say what the data is like and why nothing of it can be used."""
    source = pairs.reader.sources[0]
    [first] = source.rows.heads(1)
    if not pairs.dropped:  # a stream that was not counted
        for index, _, result in islice(pairs.reader.read(), BLOCK_ROWS):
            if isinstance(result, Drop):
                pairs.dropped[result.reason] += 1
                pairs.examples.setdefault(result.reason, f"{pairs.reader.where(index)}: {result.detail}")
    row = f"\nthe first row is\n{show_row(first[0])}" if first else ""
    hint = wrong_values(first[0], source.columns) if first and pairs.dropped.keys() == {"malformed"} else None
    return DataError(
        f"{source.spec.path} holds no usable pair\n" + "\n".join(f"  {line}" for line in pairs.drop_lines()) + row,
        hint or "check data.columns, data.filter, data.max_length and model.chat_template",
    )
