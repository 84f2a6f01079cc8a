"""Which pairs a recipe yields, in which order, and what becomes of the others; streamed and held alike."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from orpo_cli.data import dataset, survey
from orpo_cli.data import pairs as reading
from orpo_cli.data.dataset import PairSet, load_held_out, load_pairs
from orpo_cli.data.order import Position, permutation, quotas
from orpo_cli.data.tokenize import PairTokenizer
from orpo_cli.errors import DataError
from orpo_cli.model.build import load_text_side, pair_tokenizer
from orpo_cli.recipe import DataSection, Recipe, TrainSection
from tests.shared import hh_dialogues, shared

BEGINNING = Position()
STREAMED = pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])


@pytest.fixture(scope="module")
def make_tokenizer(tiny_base):
    """`make_tokenizer(max_length)`: plain template, a token a byte, so that lengths are easily counted."""

    def make(max_length: int = 1_000_000) -> PairTokenizer:
        model = {"name_or_path": str(tiny_base), "chat_template": "plain"}
        recipe = Recipe.model_validate({"model": model, "data": {"train": "-", "max_length": max_length}})
        return pair_tokenizer(recipe, load_text_side(recipe))

    return make


@pytest.fixture(scope="module")
def tokenise(make_tokenizer):
    return make_tokenizer(100)


def good(i: int, prompt: str | None = None) -> dict:
    return {"prompt": prompt or f"question {i}", "chosen": f"right {i}", "rejected": f"wrong {i}", "score": i}


def mixed(i: int) -> tuple[dict | str, str]:
    """Row `i` of a file in which much is wrong, and why it is dropped ("" if it is not)."""
    if i % 5 == 3:
        row: dict = good(i)
        match (i // 5) % 5:
            case 0:
                return row | {"chosen": row["rejected"]}, "identical"
            case 1:
                return row | {"rejected": "  "}, "empty"
            case 2:
                return row | {"chosen": "long " * 30}, "overlong"
            case 3:
                return "{broken", "malformed"
            case 4:
                turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
                other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}]
                return {"prompt": None, "chosen": turns, "rejected": other, "score": i}, "diverged"
    return good(i), ""


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mixed_file(tmp_path) -> str:
    return write(tmp_path / "mixed.jsonl", [mixed(i)[0] for i in range(83)])


USABLE = [i for i in range(83) if not mixed(i)[1]]


def load(tokenise, train, *, max_steps: int | None = None, epochs: float = 1.0, **data):
    section = DataSection.model_validate({"train": train, **data})
    return load_pairs(section, tokenise, TrainSection(max_steps=max_steps, num_train_epochs=epochs))


def taken(pairs: PairSet, count: int, *, start: Position = BEGINNING, seed: int = 1, shuffle: bool = True) -> list[int]:
    order = pairs.in_order(seed=seed, shuffle=shuffle, start=start)
    return [pair.index for pair, _ in itertools.islice(order, count)]


def naive_order(rows: int, usable: set[int], *, seed: int, epochs: int, block_rows: int) -> list[int]:
    order = []
    for epoch in range(epochs):
        for number, first in enumerate(range(0, rows, block_rows)):
            length = min(block_rows, rows - first)
            order += [first + int(i) for i in permutation(length, seed, epoch, number) if first + int(i) in usable]
    return order


def naive_mix(
    sources: list[list[int]], numbers: list[int], *, seed: int, held: bool, epochs: int = 2, block_pairs: int = 8192
) -> list[int]:
    """Each block is filled from the sources' passes, source by source, and shuffled."""
    passes = []
    for number, positions in enumerate(sources):
        turns = range(epochs * numbers[number] // len(positions) + 1)
        orders = [
            permutation(len(positions), seed, number, turn, 0) if held else range(len(positions)) for turn in turns
        ]
        passes.append(iter([positions[i] for order in orders for i in order]))
    order = []
    for epoch in range(epochs):
        blocks = 1 if held else -(-sum(numbers) // block_pairs)
        drawn = [0] * len(sources)
        for block in range(blocks):
            content = []
            for number in range(len(sources)):
                while drawn[number] < (block + 1) * numbers[number] // blocks:
                    content.append(next(passes[number]))
                    drawn[number] += 1
            order += [content[i] for i in permutation(len(content), seed, epoch, block)]
        assert drawn == numbers
    return order


# Order


@STREAMED
def test_the_order_is_a_function_of_seed_epoch_and_row(tokenise, mixed_file, streaming):
    pairs, held_out = load(tokenise, mixed_file, streaming=streaming)
    assert held_out is None
    assert (pairs.held is None) == streaming
    expected = naive_order(83, set(USABLE), seed=7, epochs=3, block_rows=83)
    assert taken(pairs, len(expected), seed=7) == expected
    assert taken(pairs, 2 * len(USABLE), shuffle=False) == 2 * USABLE


def test_a_long_stream_is_shuffled_block_by_block(tokenise, mixed_file, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK_ROWS", 16)
    pairs, _ = load(tokenise, mixed_file, streaming=True)
    expected = naive_order(83, set(USABLE), seed=7, epochs=3, block_rows=16)
    assert taken(pairs, len(expected), seed=7) == expected


@STREAMED
@pytest.mark.parametrize("block_rows", [8192, 16])
def test_from_any_position_comes_exactly_the_rest(tokenise, mixed_file, streaming, block_rows, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK_ROWS", block_rows)
    pairs, _ = load(tokenise, mixed_file, streaming=streaming)
    count = 2 * len(USABLE) + 5
    whole = list(itertools.islice(pairs.in_order(seed=3, shuffle=True, start=Position()), count))
    indices = [pair.index for pair, _ in whole]
    for done in range(0, count, 7):
        start = whole[done - 1][1] if done else Position()
        assert taken(pairs, count - done, seed=3, start=start) == indices[done:]


@STREAMED
@pytest.mark.parametrize("batch_size", [1, 4, 7, 32, 66, 67, 200])
def test_steps_of_any_size_are_the_same_pairs_in_the_same_order(tokenise, mixed_file, streaming, batch_size):
    pairs, _ = load(tokenise, mixed_file, streaming=streaming)
    total = round(2.5 * len(USABLE))
    steps = list(pairs.steps(batch_size, seed=5, shuffle=True, start=Position(), total_pairs=total))
    assert [len(step) for step, _ in steps[:-1]] == [batch_size] * (len(steps) - 1)
    flat = [pair.index for step, _ in steps for pair in step]
    assert flat == naive_order(83, set(USABLE), seed=5, epochs=3, block_rows=83)[:total]
    # Each step's position is where the next one starts.
    half = len(steps) // 2
    if half:
        done = half * batch_size
        rest = pairs.steps(batch_size, seed=5, shuffle=True, start=steps[half - 1][1], total_pairs=total - done)
        assert [pair.index for step, _ in rest for pair in step] == flat[done:]


def test_a_step_straddles_two_epochs(tokenise, tmp_path):
    pairs, _ = load(tokenise, write(tmp_path / "ten.jsonl", map(good, range(10))))
    steps = pairs.steps(4, seed=0, shuffle=False, start=Position(), total_pairs=20)
    assert [[pair.index for pair in step] for step, _ in steps] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("epochs", "batch_size", "total", "steps"), [(1, 4, 10, 3), (2.5, 4, 25, 7), (0.3, 4, 3, 1), (0.01, 4, 1, 1)]
)
def test_epochs_may_be_fractions(tokenise, tmp_path, epochs, batch_size, total, steps):
    pairs, _ = load(tokenise, write(tmp_path / "ten.jsonl", map(good, range(10))))
    train = TrainSection(num_train_epochs=float(epochs), batch_size=batch_size)
    assert (pairs.total_pairs(train), pairs.total_steps(train)) == (total, steps)
    made = list(pairs.steps(batch_size, seed=0, shuffle=True, start=Position(), total_pairs=total))
    assert len(made) == steps
    assert sum(len(step) for step, _ in made) == total
    assert pairs.epochs(made[-1][1], total) == pytest.approx(total / 10)


def test_max_steps_wins_over_epochs(tokenise, tmp_path):
    pairs, _ = load(tokenise, write(tmp_path / "ten.jsonl", map(good, range(10))))
    train = TrainSection(num_train_epochs=1.0, max_steps=9, batch_size=4)
    assert (pairs.total_pairs(train), pairs.total_steps(train)) == (None, 9)


def test_a_stream_with_max_steps_is_not_read_beforehand(tokenise, mixed_file):
    pairs, _ = load(tokenise, mixed_file, streaming=True, max_steps=5)
    assert (pairs.rows, pairs.pairs, pairs.held) == (None, None, None)
    assert pairs.first().index == 0
    expected = naive_order(83, set(USABLE), seed=1, epochs=2, block_rows=83)
    assert taken(pairs, len(expected)) == expected
    assert pairs.epochs(Position(3, 10), 200) == 3.0
    counted = pairs.summary()  # while it was read, each row once in two epochs
    assert counted["rows"] == 83
    assert sum(counted["dropped"].values()) == 83 - len(USABLE)


def test_a_stream_that_is_counted_as_it_is_read_is_refused_when_too_much_is_dropped(tokenise, mixed_file):
    pairs, _ = load(tokenise, mixed_file, streaming=True, max_steps=5, max_dropped=0.1)
    with pytest.raises(DataError, match="above data"):
        taken(pairs, 5)


# Several sources, limits, duplicates, filters


@STREAMED
def test_sources_follow_one_another_and_positions_count_over_all(tokenise, tmp_path, streaming):
    first = write(tmp_path / "a.jsonl", [mixed(i)[0] for i in range(20)])
    second = write(tmp_path / "b.jsonl", map(good, range(100, 110)))
    pairs, _ = load(tokenise, [first, second], streaming=streaming)
    usable = [i for i in range(20) if not mixed(i)[1]] + list(range(20, 30))
    assert (pairs.rows, pairs.pairs) == (30, len(usable))
    assert taken(pairs, len(usable), shuffle=False) == usable
    assert taken(pairs, 2 * len(usable)) == naive_mix(
        [usable[:-10], usable[-10:]], [16, 10], seed=1, held=not streaming
    )
    assert pairs.reader.where(23).endswith("b.jsonl, row 3 (line 4)")


@STREAMED
def test_max_pairs_counts_usable_pairs_of_its_source(tokenise, tmp_path, streaming):
    first = write(tmp_path / "a.jsonl", [mixed(i)[0] for i in range(20)])
    second = write(tmp_path / "b.jsonl", map(good, range(100, 110)))
    sources = [{"path": first, "max_pairs": 5}, {"path": second, "max_pairs": 3}]
    pairs, _ = load(tokenise, sources, streaming=streaming)
    # Row 3 of the first source is no pair, so that its fifth pair is row 5; the second source begins at position 6.
    assert taken(pairs, 8, shuffle=False) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert (pairs.rows, pairs.pairs, pairs.dropped) == (9, 8, Counter(identical=1))
    assert taken(pairs, 16) == naive_mix([[0, 1, 2, 4, 5], [6, 7, 8]], [5, 3], seed=1, held=not streaming)
    assert taken(pairs, 5, start=Position(0, 5), shuffle=False) == [6, 7, 8, 0, 1]


@STREAMED
def test_rows_of_some_pairs_are_those_of_the_files(tokenise, tmp_path, streaming):
    """Also behind a source of which only the first pairs are taken."""
    first, second = ([good(i) for i in of] for of in (range(20), range(100, 120)))
    first[3] = good(3) | {"chosen": "wrong 3"}
    train = [
        {"path": write(tmp_path / "a.jsonl", first), "max_pairs": 5},
        {"path": write(tmp_path / "b.jsonl", second)},
    ]
    pairs, _ = load(tokenise, train, streaming=streaming)
    found = list(pairs.reader.rows_at([0, 3, 5, 6, 7, 25]))
    assert [(index, row) for index, row, _ in found] == [
        (0, first[0]),
        (5, first[5]),
        (6, second[0]),
        (7, second[1]),
        (25, second[19]),
    ]
    assert [pair.chosen for _, _, pair in found] == [row["chosen"] for _, row, _ in found]


@STREAMED
def test_deduplicate_keeps_the_first_of_equal_pairs(tokenise, tmp_path, streaming):
    rows = [good(i % 4) | {"score": i} for i in range(10)]
    path = write(tmp_path / "again.jsonl", rows)
    pairs, _ = load(tokenise, path, streaming=streaming, deduplicate=True)
    assert taken(pairs, 4, shuffle=False) == [0, 1, 2, 3]
    assert (pairs.pairs, pairs.dropped) == (4, Counter(duplicate=6))
    assert pairs.dropped_share == 0  # wanted, and no fault of the data
    assert taken(pairs, 8) == naive_order(10, {0, 1, 2, 3}, seed=1, epochs=2, block_rows=10)
    both, _ = load(tokenise, [path, path], streaming=streaming, deduplicate=True)
    assert (both.pairs, both.dropped) == (4, Counter(duplicate=16))


@STREAMED
def test_filters_of_the_recipe_and_of_a_source(tokenise, mixed_file, streaming):
    source = {"path": mixed_file, "filter": [{"column": "score", "lt": 40}]}
    pairs, _ = load(tokenise, [source], streaming=streaming, filter=[{"column": "score", "ge": 10}])
    kept = [i for i in USABLE if 10 <= i < 40]
    assert taken(pairs, len(kept), shuffle=False) == kept
    malformed = sum(mixed(i)[1] == "malformed" for i in range(83))  # these have no score to filter by
    outside = [i for i in range(83) if not 10 <= i < 40 and mixed(i)[1] != "malformed"]
    assert pairs.dropped["filtered"] == len(outside)
    assert pairs.dropped["malformed"] == malformed


def test_a_filter_on_an_unknown_column_is_refused(tokenise, mixed_file):
    with pytest.raises(DataError, match="no column 'scor'"):
        load(tokenise, mixed_file, filter=[{"column": "scor", "ge": 10}])


# Sources mixed by weight


def two_sources(tmp_path, **weights) -> tuple[list[dict], list[list[int]]]:
    """83 rows with faults and 30 without; their positions that are pairs."""
    first = write(tmp_path / "a.jsonl", [mixed(i)[0] for i in range(83)])
    second = write(tmp_path / "b.jsonl", map(good, range(100, 130)))
    sources = [{"path": path, "weight": weights.get(name)} for name, path in (("a", first), ("b", second))]
    return sources, [USABLE, list(range(83, 113))]


@STREAMED
@pytest.mark.parametrize("weights", [{}, {"a": 1, "b": 1}, {"a": 0.1, "b": 0.7}, {"a": 30.0, "b": 1}], ids=str)
@pytest.mark.parametrize("block_pairs", [8192, 16])
def test_sources_are_mixed_by_weight_in_an_order_that_can_be_computed(
    tokenise, tmp_path, streaming, weights, block_pairs, monkeypatch
):
    monkeypatch.setattr(dataset, "BLOCK_ROWS", block_pairs)
    sources, positions = two_sources(tmp_path, **weights)
    pairs, _ = load(tokenise, sources, streaming=streaming)
    total = sum(map(len, positions))
    numbers = quotas([len(USABLE), 30], list(weights.values()) or None)
    assert [source.get("pairs_per_epoch") for source in pairs.summary()["sources"]] == (
        numbers if weights else [None, None]
    )
    assert [source["pairs"] for source in pairs.summary()["sources"]] == [len(USABLE), 30]
    expected = naive_mix(positions, numbers, seed=7, held=not streaming, epochs=3, block_pairs=block_pairs)
    assert taken(pairs, 3 * total, seed=7) == expected
    for epoch in range(3):
        of_epoch = expected[epoch * total : (epoch + 1) * total]
        assert sum(i < 83 for i in of_epoch) == numbers[0]
    # No pair comes a second time more often than another of its source.
    for source in positions:
        times = Counter(expected)
        assert max(times[i] for i in source) - min(times[i] for i in source) <= 1

    whole = list(itertools.islice(pairs.in_order(seed=7, shuffle=True, start=Position()), 3 * total))
    assert [position for _, position in whole[:total]] == [Position(0, i + 1) for i in range(total)]
    for done in (1, 17, total - 1, total, total + 33, 3 * total - 2):
        assert taken(pairs, 3 * total - done, seed=7, start=whole[done - 1][1]) == expected[done:]


@STREAMED
def test_weighted_sources_with_duplicates_and_a_held_out_set(tokenise, tmp_path, streaming):
    sources, positions = two_sources(tmp_path, a=1, b=3)
    repeated = {**sources[1], "max_pairs": 20}  # none of them is left: they have all occurred
    pairs, held_out = load(tokenise, [*sources, sources[0]], streaming=streaming, eval={"holdout": 12})
    sizes = [source["pairs"] for source in pairs.summary()["sources"]]
    judged = {pair.index for pair in held_out.in_source_order()}
    again = [i + 113 for i in USABLE]
    left = [[i for i in source if i not in judged] for source in [*positions, again]]
    assert sizes == [len(source) for source in left]
    assert [source["pairs"] for source in held_out.summary()["sources"]] == [
        len(source) - size for source, size in zip([*positions, again], sizes, strict=True)
    ]
    total = sum(sizes)
    numbers = [source["pairs_per_epoch"] for source in pairs.summary()["sources"]]
    assert numbers == quotas(sizes, [1, 3, 1])
    assert taken(pairs, 2 * total) == naive_mix(left, numbers, seed=1, held=not streaming)
    with pytest.raises(DataError, match=r"b\.jsonl has the weight 3 and no usable pair"):
        load(tokenise, [sources[0], sources[1], repeated], streaming=streaming, deduplicate=True)


def test_a_weight_that_gives_no_pair_is_refused(tokenise, tmp_path):
    sources, _ = two_sources(tmp_path, a=1000, b=1)
    with pytest.raises(DataError, match=r"b\.jsonl has the weight 1 and would come in none of 97 pairs"):
        load(tokenise, sources)


# What is kept of a stream

KEPT = {"streaming": True, "deduplicate": True, "eval": {"holdout": 8}}


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The directory of what is kept, and the lines that are told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "orpo" / "counts"


def described(sets: tuple[PairSet, PairSet | None]) -> list:
    training, held_out = sets
    order = taken(training, 2 * training.pairs, seed=3)
    return [
        training.summary(),
        training.examples,
        order,
        held_out and held_out.summary(),
        held_out and [*held_out.held],
    ]


@pytest.mark.parametrize("several", [False, True])
def test_a_stream_is_counted_once_for_all_runs(tokenise, make_tokenizer, tmp_path, kept, several, monkeypatch):
    sources, _ = two_sources(tmp_path, a=1, b=2)
    train = sources if several else sources[0]["path"]
    first = described(load(tokenise, train, **KEPT))
    [file] = kept.iterdir()
    whole = file.read_text()
    count_rows = survey.count_rows
    counts = []
    monkeypatch.setattr(survey, "count_rows", lambda *args: counts.append(1) or count_rows(*args))
    assert described(load(tokenise, train, **KEPT)) == first
    assert not counts
    # A weight, the limit of dropped rows and the order change nothing that is counted.
    load(tokenise, train, **KEPT, max_dropped=0.9, shuffle=False)
    assert not counts
    with pytest.raises(DataError, match=r"above data\.max_dropped"):
        load(tokenise, train, **KEPT, max_dropped=0.01)
    assert not counts
    # Everything else does.
    for number, change in enumerate([{"eval": {"holdout": 9}}, {"deduplicate": False}, {"system": "s"}], 1):
        load(tokenise, train, **KEPT | change)
        assert len(counts) == number
    load(make_tokenizer(99), train, **KEPT)
    assert len(counts) == 4
    path = Path(sources[0]["path"])
    path.write_text(path.read_text() + json.dumps(good(999)) + "\n")
    assert load(tokenise, train, **KEPT)[0].rows == first[0]["rows"] + 1
    assert len(counts) == 5
    # A file that is not what was written is as good as none.
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    for damaged in ("", "[]", "{}", whole[: len(whole) // 2], whole.replace(file.stem, "0" * 64)):
        file.write_text(damaged)
        counts.clear()
        assert described(load(tokenise, train, **KEPT)) == first
        assert (len(counts), file.read_text()) == (1, whole)


def test_counts_that_cannot_be_kept_cost_no_more_than_time(tokenise, mixed_file, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", mixed_file)
    assert load(tokenise, mixed_file, streaming=True)[0].pairs == len(USABLE)


def test_a_long_pass_tells_how_far_it_is(tokenise, tmp_path, kept, monkeypatch):
    monkeypatch.setattr(survey, "TELL_SECONDS", -1.0)
    path = write(tmp_path / "long.jsonl", map(good, range(600)))
    section = DataSection.model_validate({"train": path, "streaming": True})
    told: list[str] = []
    load_pairs(section, tokenise, TrainSection(), told.append)
    assert told[0].startswith("counting the pairs")
    assert told[1:] == ["  256 rows read, 255 pairs", "  512 rows read, 511 pairs"]
    told.clear()
    load_pairs(section, tokenise, TrainSection(), told.append)
    assert told == []


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz", "long.csv", "long.parquet"])
def test_a_resumed_stream_reads_no_more_than_it_needs(tokenise, tmp_path, kept, name, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK_ROWS", 256)
    path, rows = tmp_path / name, [good(i) for i in range(3000)]
    match path.suffix:
        case ".parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
        case ".csv":
            pa.csv.write_csv(pa.Table.from_pylist(rows), path)
        case ".gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        case _:
            write(path, rows)
    whole, held_out = load(tokenise, str(path), **KEPT)
    expected = taken(whole, 3000)
    judged = [pair.index for pair in held_out.in_source_order()]

    made: list[int] = []
    batch = PairTokenizer.batch
    monkeypatch.setattr(
        PairTokenizer, "batch", lambda self, rows: made.extend(index for index, _ in rows) or batch(self, rows)
    )
    parsed: list[int] = []
    pair_of = reading.PairReader._pair
    monkeypatch.setattr(
        reading.PairReader, "_pair", lambda self, source, row: parsed.append(1) or pair_of(self, source, row)
    )
    resumed, again = load(tokenise, str(path), **KEPT)
    assert made == judged == [pair.index for pair in again.in_source_order()]
    assert len(parsed) == 8
    start = Position(0, 2560)  # the eleventh block
    done = 2560 - sum(i < 2560 for i in judged)
    assert taken(resumed, 10, start=start) == expected[done : done + 10]
    assert set(made[8:]) <= set(range(2560, 2816))
    assert len(parsed) == 8 + 256


# The held-out set


def prompts_file(tmp_path) -> tuple[str, list[str]]:
    """40 rows; the prompts 0 to 9 stand two to four times."""
    prompts = [f"question {i}" for i in range(10)] + [f"question {i * i % 10}" for i in range(10)]
    prompts += [f"question {i}" for i in range(20, 40)]
    return write(tmp_path / "prompts.jsonl", [good(i, prompt) for i, prompt in enumerate(prompts)]), prompts


@STREAMED
@pytest.mark.parametrize(("holdout", "wanted"), [(0.25, 10), (8, 8), (1, 1), (0.001, 1), (0.9, 36)])
def test_the_held_out_set_takes_whole_prompts(tokenise, tmp_path, streaming, holdout, wanted):
    path, prompts = prompts_file(tmp_path)
    pairs, held_out = load(tokenise, path, streaming=streaming, eval={"holdout": holdout})
    judged = [pair.index for pair in held_out.in_source_order()]
    trained = taken(pairs, pairs.pairs, shuffle=False)
    assert sorted(judged + trained) == list(range(40))
    assert len(judged) == held_out.pairs == wanted
    assert judged == sorted(judged)
    assert {prompts[i] for i in judged}.isdisjoint(prompts[i] for i in trained)
    assert pairs.pairs == 40 - wanted
    assert taken(pairs, 2 * len(trained)) == naive_order(40, set(trained), seed=1, epochs=2, block_rows=40)


def test_the_split_is_the_same_for_every_seed_mode_and_order_of_rows(tokenise, tmp_path):
    path, prompts = prompts_file(tmp_path)
    backwards = write(tmp_path / "backwards.jsonl", [good(i, prompt) for i, prompt in enumerate(prompts)][::-1])
    splits = set()
    for source, streaming, seed in itertools.product([path, backwards], [False, True], [1, 2]):
        section = DataSection.model_validate({"train": source, "streaming": streaming, "eval": {"holdout": 9}})
        for held_out in (
            load_pairs(section, tokenise, TrainSection(seed=seed))[1],
            load_held_out(section, tokenise, TrainSection(seed=seed, max_steps=3)),
        ):
            rows = {pair.index if source == path else 39 - pair.index for pair in held_out.in_source_order()}
            splits.add(frozenset(rows))
    assert len(splits) == 1


@pytest.mark.parametrize(("holdout", "what"), [(40, "train"), (1000, "train")])
def test_a_holdout_that_leaves_nothing_is_refused(tokenise, tmp_path, holdout, what):
    path, _ = prompts_file(tmp_path)
    with pytest.raises(DataError, match=f"leaves nothing to {what} on: there are 40 pairs of 30 prompts"):
        load(tokenise, path, eval={"holdout": holdout})


def test_a_single_prompt_cannot_be_split(tokenise, tmp_path):
    path = write(tmp_path / "one.jsonl", [good(i, "the same") for i in range(10)])
    with pytest.raises(DataError, match="leaves nothing to evaluate on: there are 10 pairs of 1 prompts"):
        load(tokenise, path, eval={"holdout": 0.2})


@STREAMED
def test_a_held_out_source_of_its_own(tokenise, mixed_file, tmp_path, streaming):
    judged = write(tmp_path / "judged.jsonl", [mixed(i)[0] for i in range(30)])
    pairs, held_out = load(tokenise, mixed_file, streaming=streaming, eval=judged)
    assert pairs.pairs == len(USABLE)
    assert [pair.index for pair in held_out.in_source_order()] == [i for i in USABLE if i < 30]


def test_without_held_out_data_there_is_nothing_to_evaluate_on(tokenise, mixed_file):
    with pytest.raises(DataError, match="no held-out data"):
        load_held_out(DataSection.model_validate({"train": mixed_file}), tokenise, TrainSection())


# What is dropped


@STREAMED
def test_rows_are_dropped_and_counted_by_reason(tokenise, mixed_file, streaming):
    pairs, _ = load(tokenise, mixed_file, streaming=streaming)
    expected = Counter(reason for i in range(83) if (reason := mixed(i)[1]))
    assert pairs.dropped == expected
    assert (pairs.rows, pairs.pairs) == (83, len(USABLE))
    assert pairs.dropped_share == pytest.approx(1 - len(USABLE) / 83)
    first = {reason: next(i for i in range(83) if mixed(i)[1] == reason) for reason in expected}
    for line, (reason, count) in zip(pairs.drop_lines(), sorted(expected.items()), strict=True):
        row = first[reason]
        assert line.startswith(f"{count} {reason}, e.g. {mixed_file}, row {row} (line {row + 1}): ")
    assert pairs.summary()["dropped"] == dict(sorted(expected.items()))


@STREAMED
def test_too_many_dropped_rows_are_an_error_that_counts_them(tokenise, mixed_file, streaming):
    with pytest.raises(DataError) as error:
        load(tokenise, mixed_file, streaming=streaming, max_dropped=0.1)
    assert error.value.message.startswith("19% of 83 rows were dropped, above data.max_dropped: 0.1\n")
    assert "  4 identical, e.g. " in error.value.message
    assert load(tokenise, mixed_file, streaming=streaming, max_dropped=0.2)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_dropped_on_purpose_hide_no_faulty_ones(tokenise, tmp_path, streaming):
    rows = [{"prompt": f"p{i}", "chosen": "yes" if i % 5 < 2 else 3, "rejected": "no", "keep": 1} for i in range(100)]
    rows += [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no", "keep": 0} for i in range(900)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = {"filter": [{"column": "keep", "eq": 1}], "streaming": streaming}
    with pytest.raises(DataError, match=r"^60% of 100 rows were dropped, above data\.max_dropped: 0\.5"):
        load(tokenise, str(path), **keep, max_dropped=0.5)
    pairs, _ = load(tokenise, str(path), **keep, max_dropped=0.6)
    assert pairs.dropped == {"filtered": 900, "malformed": 60}


@STREAMED
def test_a_message_with_a_key_that_is_no_unicode_is_dropped_alone(tokenise, tmp_path, streaming):
    path = write(tmp_path / "rows.jsonl", [good(0), good(1) | {"prompt": {"\ud800": None}}, good(2)])
    pairs, _ = load(tokenise, path, streaming=streaming)
    assert (pairs.pairs, pairs.dropped) == (2, {"malformed": 1})


@STREAMED
def test_strict_stops_at_the_first_malformed_row(tokenise, mixed_file, streaming):
    row = next(i for i in range(83) if mixed(i)[1] == "malformed")
    with pytest.raises(DataError) as error:
        load(tokenise, mixed_file, streaming=streaming, strict=True)
    assert error.value.message.startswith(f"{mixed_file}, row {row} (line {row + 1}): not JSON")
    assert "strict" in error.value.hint


@STREAMED
@pytest.mark.parametrize("max_steps", [None, 3])
def test_without_a_usable_pair_a_row_is_shown_and_why(tokenise, tmp_path, streaming, max_steps):
    path = write(tmp_path / "same.jsonl", [good(i) | {"chosen": "same", "rejected": "same"} for i in range(5)])
    with pytest.raises(DataError) as error:
        load(tokenise, path, streaming=streaming, max_steps=max_steps)
    assert error.value.message == (
        f"{path} holds no usable pair\n"
        f"  5 identical, e.g. {path}, row 0 (line 1): chosen and rejected are the same\n"
        "the first row is\n"
        "  prompt: 'question 0'\n  chosen: 'same'\n  rejected: 'same'\n  score: 0"
    )


def test_only_broken_rows(tokenise, tmp_path):
    path = write(tmp_path / "broken.jsonl", ["{broken"] * 3)
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        load(tokenise, path)


@STREAMED
def test_fingerprint_and_summary(tokenise, mixed_file, streaming):
    pairs, _ = load(tokenise, mixed_file, streaming=streaming)
    [source] = pairs.summary()["sources"]
    assert source["path"] == mixed_file
    assert source["format"] == "prompt"
    assert source["streamed"] == streaming
    assert source["fingerprint"] == pairs.fingerprint
    Path(mixed_file).write_text(Path(mixed_file).read_text() + json.dumps(good(99)) + "\n")
    assert load(tokenise, mixed_file, streaming=streaming)[0].fingerprint != pairs.fingerprint


@STREAMED
@pytest.mark.parametrize("holdout", [None, 8])
def test_truncated_pairs_are_counted_in_their_set(make_tokenizer, tmp_path, streaming, holdout):
    rows = [good(i) | {"chosen": "long " * (i % 7)} for i in range(1, 60) if i % 7]
    tokenise = make_tokenizer(40)
    tokenise.overlong = "truncate_response"
    before = [f"User: {row['prompt']}\n\nAssistant: " for row in rows]
    whole = [
        max(length(text + row["chosen"]), length(text + row["rejected"]))
        for text, row in zip(before, rows, strict=True)
    ]
    sets = load(
        tokenise, write(tmp_path / "long.jsonl", rows), streaming=streaming, eval=holdout and {"holdout": holdout}
    )
    sets = [pairs for pairs in sets if pairs]
    held_out = set(sets[1].held) if holdout else set()
    for pairs, within in zip(sets, (set(range(len(rows))) - held_out, held_out), strict=False):
        assert pairs.summary()["truncated"] == pairs.truncated == sum(whole[i] > 40 for i in within) > 0


def test_truncated_pairs_of_a_stream_that_is_not_counted_are_counted_once(make_tokenizer, tmp_path):
    tokenise = make_tokenizer(40)
    tokenise.overlong = "truncate_response"
    path = write(tmp_path / "long.jsonl", [good(i) | {"chosen": "long " * (i % 3 * 8 + 1)} for i in range(30)])
    pairs, _ = load(tokenise, path, streaming=True, max_steps=1)
    taken(pairs, 70)
    assert pairs.truncated == 20


# Real files, counted a second time by a program that knows only their one shape


def length(text: str) -> int:
    return len(text.encode()) + 2  # a token a byte, BOS and EOS


def reason_of(prompt_text: str, chosen: str, rejected: str, longest: int) -> str:
    if not chosen.strip() or not rejected.strip():
        return "empty"
    if chosen == rejected:
        return "identical"
    return "overlong" if max(length(prompt_text + chosen), length(prompt_text + rejected)) > longest else ""


@pytest.mark.parametrize("longest", [300, 2000])
def test_counts_on_instruction_preference(make_tokenizer, longest):
    path = shared("data/instruction-preference.json")
    pairs, _ = load(make_tokenizer(longest), str(path), max_dropped=1.0)
    rows = json.loads(path.read_text())
    reasons = []
    for row in rows:
        question = "\n\n".join(part for part in (row["instruction"], row["input"]) if part and part.strip())
        text = f"User: {question}\n\nAssistant: "
        reasons.append(reason_of(text, row["chosen"], row["rejected"], longest))
    assert pairs.dropped == Counter(filter(None, reasons))
    assert [pair.index for pair in pairs.in_source_order()] == [i for i, reason in enumerate(reasons) if not reason]
    lengths = [len(pair.chosen_ids) for pair in pairs.in_source_order()]
    assert max(lengths) <= longest


def test_counts_on_hh(make_tokenizer):
    pairs, _ = load(make_tokenizer(), str(shared("data/hh-rlhf-harmless-test.jsonl.gz")), max_dropped=1.0)
    reasons = []
    for chosen, rejected in hh_dialogues():
        ends_right = all([who for who, _ in side[-2:]] == ["Human", "Assistant"] for side in (chosen, rejected))
        if not ends_right or chosen[:-1] != rejected[:-1]:
            reasons.append("diverged")
        elif not chosen[-2][1]:
            reasons.append("empty")
        else:
            reasons.append(reason_of("", chosen[-1][1], rejected[-1][1], 10**9))
    assert pairs.dropped == Counter(filter(None, reasons))
    assert [pair.index for pair in pairs.in_source_order()] == [i for i, reason in enumerate(reasons) if not reason]


def test_streamed_is_held_on_a_real_file(make_tokenizer):
    path = str(shared("data/stack_exchange_paired_tiny.json"))
    sets = [load(make_tokenizer(3000), path, streaming=streaming, max_dropped=1.0)[0] for streaming in (False, True)]
    assert sets[0].dropped == sets[1].dropped
    orders = [
        list(itertools.islice(pairs.in_order(seed=2, shuffle=True, start=Position()), 2 * sets[0].pairs))
        for pairs in sets
    ]
    for (held, held_position), (streamed, streamed_position) in zip(*orders, strict=True):
        assert held_position == streamed_position
        assert np.array_equal(held.chosen_ids, streamed.chosen_ids)
        assert np.array_equal(held.rejected_ids, streamed.rejected_ids)


@STREAMED
def test_rows_of_megabytes_cost_no_more_than_long_ones(make_tokenizer, tmp_path, streaming):
    size = 5_000_000
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * (size // 100)
    huge = [
        {"prompt": "x" * size, "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "chosen": "word " * (size // 5), "rejected": "b"},
        {"prompt": "</s>" * (size // 4), "chosen": "a", "rejected": "b"},
        {"prompt": [*turns, {"role": "user", "content": "c"}], "chosen": "a", "rejected": "b"},
    ]
    path = write(tmp_path / "huge.jsonl", [*huge, good(4)])
    tokenise = make_tokenizer(100)
    started = time.process_time()
    pairs, _ = load(tokenise, path, streaming=streaming, max_dropped=1.0)
    assert time.process_time() - started < 10
    assert (pairs.rows, pairs.pairs) == (5, 1)
    assert pairs.dropped == {"overlong": 4}
    assert f"{path}, row 0 (line 1)" in pairs.examples["overlong"]
