"""Rows from files, directories and the hub, in source order, held in memory or streamed.

A row's position counts over all sources, one after the other, and is the same streamed or not. JSON, JSON lines
and CSV are read here, value by value, for what a columnar reader cannot keep: texts that look like dates or
nulls, a column with strings in one row and lists in another, one broken line among good ones. Hub datasets, dataset
cards and saved datasets are for `datasets` to read.
"""

from __future__ import annotations

import bisect
import csv
import difflib
import glob
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

from orpo_cli.errors import DataError, RunError

STREAM_ABOVE_BYTES = 1 << 30
"""With `streaming: auto`, local files that are larger than this in all are streamed."""

_KINDS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_READABLE = ".json, .jsonl, .ndjson, .csv, .tsv or .parquet, also packed as .gz or .zst"


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


def _every(offset: int) -> bool:
    return True


def _none(offset: int) -> bool:
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
            if any(True for _ in self.read(offset, _none)):
                self.seen = offset + 1
            else:
                self.rows()
        return offset < (self.seen if self.count is None else self.count)

    def rows(self) -> int:
        """How many rows there are; reads a stream to its end where that is not known yet."""
        if self.count is None:
            self.count = sum(1 for _ in self.read(0, _none))
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
        self.fingerprint = _digest(part.fingerprint.encode() for part in parts)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Give the rows from the position `start` on. Every call reads afresh."""
        return (row for _, row in self.numbered(start))

    def numbered(self, start: int = 0, wanted: Wanted = _every) -> Iterator[tuple[int, Row]]:
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
            rows = itertools.chain.from_iterable(part.read(0, _every) for part in self._parts if part.source == index)
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
        return f"{part.name}, {_row_in_file(row, part.blank_lines)}"

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


def open_source(
    specs: Sequence[SourceSpec], streaming: Literal["auto"] | bool = "auto", usual: Sequence[str] = ("train",)
) -> Rows:
    """Open sources. A source that names no split has its first one of `usual`, or else its only one.

    `auto` streams hub datasets, and local files above `STREAM_ABOVE_BYTES` in all. Raises `DataError` for what
    is missing, unreadable or without rows.
    """
    found = [_local_files(spec, usual) for spec in specs]
    size_bytes = sum(file.stat().st_size for files in found if files for file in files)
    stream_files = streaming is True or (streaming == "auto" and size_bytes > STREAM_ABOVE_BYTES)
    parts: list[Part] = []
    streamed = streaming is True
    for index, (spec, files) in enumerate(zip(specs, found, strict=True)):
        if files is not None and _is_saved_dataset(Path(spec.path).expanduser()):
            opened = [_saved_part(index, spec, usual, files)]
        elif files is not None:
            opened = [_file_part(index, file, stream_files) for file in files]
            streamed |= stream_files
        else:
            stream = streaming is True or (streaming == "auto" and not _sliced(spec.split) and not _offline())
            opened = [_hub_part(index, spec, usual, stream)]
            streamed |= stream
        if not any(part.holds(0) for part in opened):
            raise DataError(f"{spec.path} holds no rows")
        parts += opened if spec.group_by is None else [_grouped(part, spec.group_by, streamed) for part in opened]
    return Rows(specs, parts, streamed)


def _grouped(part: Part, column: str, streamed: bool) -> Part:
    """Make one row, {column: value, "rows": [...]}, of those that follow one another with one value in a column.

    A row without a value stays alone. To get to a later group, the earlier ones are read.
    """
    first = [row for row in itertools.islice(part.read(0, _every), 64) if isinstance(row, Mapping)]
    if not any(column in row for row in first):
        known = ", ".join(dict.fromkeys(key for row in first for key in row))
        raise DataError(f"group_by: {part.name} has no column {column!r}", f"it has {known}")

    def value(row: Row | None) -> Any:
        found = row.get(column) if isinstance(row, Mapping) else None
        return object() if found is None else found

    def read(start: int, wanted: Wanted) -> Iterator[Row | None]:
        groups = itertools.groupby(part.read(0, _every), value)
        for number, (_, rows) in itertools.islice(enumerate(groups), start, None):
            yield _group(column, list(rows)) if wanted(number) else None

    grouped = Part(part.source, f"{part.name} by {column}", f"{part.fingerprint} by {column}", read)
    if not streamed:
        grouped.rows()
    return grouped


def _group(column: str, rows: list[Any]) -> Row:
    [first, *_] = rows
    return first if isinstance(first, BadRow) else {column: first.get(column), "rows": rows}


# Local files


def _local_files(spec: SourceSpec, usual: Sequence[str]) -> list[Path] | None:
    """Return the source's files in sorted order, or None if it is on the hub."""
    path = Path(spec.path).expanduser()
    if path.is_dir():
        if _sliced(spec.split):
            raise DataError(f"{spec.path}: only a hub dataset's split can be sliced or summed", "use `max_pairs`")
        if _is_saved_dataset(path):
            return sorted(path.rglob("*.arrow"))
        return _directory_files(path, spec, usual)
    if path.is_file():
        if _kind(path) is None:
            raise DataError(f"{spec.path} is of no kind that can be read", f"files may be {_READABLE}")
        files = [path]
    elif glob.has_magic(spec.path):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
        files = sorted(match for match in matches if match.is_file() and _kind(match))
        if not files:
            raise DataError(f"no data file matches {spec.path}", f"files may be {_READABLE}")
    elif _is_hub_id(spec.path):
        return None
    else:
        raise DataError(f"there is no file or directory {spec.path}", _nearest(path))
    if spec.name is not None:
        raise DataError(f"{spec.path} is a file and has no configuration {spec.name!r}", "leave `name` out")
    if spec.split not in (None, "train"):
        raise DataError(f"{spec.path} is a file and has no split {spec.split!r}", "leave `split` out")
    return files


_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
_SPLIT_FILE = re.compile(rf"([\w-]+?)-\d{{5}}-of-\d{{5}}.*|({'|'.join(_SPLIT_NAMES)})(?:[-_]\d+)?")
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "state.json")


def _directory_files(path: Path, spec: SourceSpec, usual: Sequence[str]) -> list[Path]:
    """Return the data files of one split of a directory: by its dataset card, or by the files' names."""
    card = path / "README.md"
    if card.is_file() and re.match(r"---\s.*?^configs:", card.read_text(errors="replace"), re.DOTALL | re.MULTILINE):
        splits = _builder(spec, str(path), revision=None).config.data_files or {}
        split = _choose_split([str(name) for name in splits], spec, usual)
        files = sorted(Path(file) for file in splits[split])
        if unread := [file for file in files if _kind(file) is None]:
            raise DataError(f"{unread[0]} is of no kind that can be read", f"files may be {_READABLE}")
        return files
    if spec.name is not None:
        raise DataError(f"{spec.path} has no dataset card with the configuration {spec.name!r}", "leave `name` out")
    files = sorted(file for file in path.rglob("*") if _is_data_file(file, path))
    if not files:
        raise DataError(f"{spec.path} holds no data file", f"files may be {_READABLE}")
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_in_name(file, path), []).append(file)
    unnamed = by_split.pop(None, [])
    if unnamed and by_split:
        raise DataError(
            f"{spec.path} holds files named after a split and others, such as {unnamed[0].relative_to(path)}",
            f"name the files that you mean, for instance {path / '*.jsonl'}",
        )
    named = {split: files for split, files in by_split.items() if split} or {"train": unnamed}
    return named[_choose_split(list(named), spec, usual)]


def _is_data_file(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and file.name not in _NO_DATA and _kind(file) is not None


def _split_in_name(file: Path, root: Path) -> str | None:
    """Return the split that a file's name tells (`train.jsonl`, `test-00000-of-00002.parquet`), or its folder's."""
    if match := _SPLIT_FILE.fullmatch(file.name.split(".")[0]):
        return match[1] or match[2]
    return next((part for part in file.relative_to(root).parts[:-1] if part in _SPLIT_NAMES), None)


def _kind(path: Path) -> str | None:
    """Return the kind of file that the name tells, None for one that cannot be read."""
    packed = path.suffix.lower() in (".gz", ".zst")
    return _KINDS.get((path.with_suffix("") if packed else path).suffix.lower())


def _nearest(path: Path) -> str:
    """Suggest what may have been meant by a path that is not there."""
    there = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(entry.name for entry in there.iterdir())
    missing = path.relative_to(there).parts[0]
    if close := difflib.get_close_matches(missing, names, n=3, cutoff=0.5):
        return "nearest: " + ", ".join(str(there / name) for name in close)
    return f"there is no {missing} in {there.resolve()}; a hub dataset is named owner/name"


def _file_part(source: int, path: Path, streamed: bool) -> Part:
    blank_lines: list[int] = []
    with _damage_explained(path, lambda: "row 0"):
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
                raise DataError(f"{path} is a Git LFS pointer, not the data", "fetch the data with `git lfs pull`")
        fingerprint = _file_digest(path)
        if _kind(path) == "parquet":
            return _parquet_part(source, path, fingerprint, streamed)
        items, parse = _reader(path, blank_lines)
    lines = blank_lines if parse is _parse_line else None

    def read(start: int, wanted: Wanted) -> Iterator[Row | None]:
        row = 0
        with _damage_explained(path, lambda: _row_in_file(row, lines)):
            for item in items():
                if row >= start:
                    yield parse(item) if wanted(row) else None
                row += 1

    if streamed:
        return Part(source, str(path), fingerprint, read, blank_lines=lines)
    held = list(read(0, _every))
    return Part(source, str(path), fingerprint, lambda start, _: iter(held[start:]), len(held), blank_lines=lines)


def _row_in_file(row: int, blank_lines: list[int] | None) -> str:
    """Say which row (from 0) it is, and of JSON lines, where blank ones stand before these rows, the line (from 1)."""
    return f"row {row}" if blank_lines is None else f"row {row} (line {row + 1 + bisect.bisect(blank_lines, row)})"


@contextmanager
def _damage_explained(path: Path, row: Callable[[], str]) -> Iterator[None]:
    """Turn what a damaged file raises into a `DataError` that names the file and the row reached.

    What is left of a packed file that was cut short is never taken for the whole of it.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is damaged or cut short: {row()} cannot be read ({error})", "copy or download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}, {row()}: {error.strerror or error}") from error


def _reader(path: Path, blank_lines: list[int]) -> tuple[Callable[[], Iterator[Any]], Callable[[Any], Row]]:
    """Return what opens a text file and gives its items one by one, and what makes a row of an item."""
    kind = _kind(path)
    if kind in ("csv", "tsv"):
        return lambda: _table_rows(path, "," if kind == "csv" else "\t"), _as_row
    match _json_shape(path):
        case "lines":
            return lambda: _lines(path, blank_lines), _parse_line
        case "array":
            return lambda: _array_items(path), _as_row
        case "object":
            return lambda: _object_items(path), _as_row


def _open(path: Path) -> IO[bytes]:
    """Open a file for reading its bytes, unpacked and without a byte order mark."""
    file: gzip.GzipFile | io.BufferedReader
    if path.suffix.lower() == ".gz":
        file = gzip.open(path)  # noqa: SIM115 - the caller closes it
    elif path.suffix.lower() == ".zst":
        file = io.BufferedReader(_ZstdFile(path))
    else:
        file = path.open("rb")
    start = file.peek(3)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        file.close()
        raise DataError(f"{path} is UTF-16, not UTF-8", f"convert it, for instance: iconv -f UTF-16 -t UTF-8 {path}")
    if start.startswith(b"\xef\xbb\xbf"):
        file.read(3)
    return cast(IO[bytes], file)


# A byte that is no UTF-8 becomes a lone surrogate, which spoils the text that it stands in and no other row.
_decoded = partial(str, encoding="utf-8", errors="surrogateescape")


def _open_text(path: Path) -> IO[str]:
    """Open a file for reading its text, line ends as they stand."""
    return io.TextIOWrapper(_open(path), encoding="utf-8", errors="surrogateescape", newline="")


class _ZstdFile(io.RawIOBase):
    """A Zstandard file of one or more frames; unlike the library's own reader it notices a missing end."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: .zst needs one more package", "pip install 'orpo-cli[zstd]'") from None
        self._new_frame = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._error = zstandard.ZstdError
        self._file = path.open("rb")
        self._frame = self._new_frame()
        self._started = False  # inside a frame
        self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._frame.unused_data
            if self._frame.eof:
                self._frame, self._started = self._new_frame(), False
            packed = packed or self._file.read(1 << 17)
            if not packed:
                if self._started:
                    raise EOFError("the compressed file ended before its end marker")
                return 0
            self._started = True
            try:
                self._unpacked = self._frame.decompress(packed)
            except self._error as error:
                raise EOFError(str(error)) from error
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


# JSON: the value of every text is kept as it is


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadRow:
    """Make an object of its members; one with a key twice has no one meaning."""
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    keys = [key for key, _ in pairs]
    return BadRow(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")


# Python writes NaN where other tools write null.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=lambda digits: int(digits) if len(digits) < 4000 else float(digits),  # Python reads no longer ones
    parse_constant=lambda name: None if name == "NaN" else float(name),
    strict=False,
)


def _json_shape(path: Path) -> Literal["lines", "array", "object"]:
    """Tell JSON lines from an array and from one object around the rows, whatever the file's name says."""
    with _open(path) as file:
        start = file.read(1 << 16).lstrip()
    json_lines_by_name = _kind(path) == "jsonl"
    if start.startswith(b"[") and not json_lines_by_name:
        return "array"
    with _open(path) as file:
        lines = (line for line in map(bytes.strip, file) if line)
        first, second = next(lines, b""), next(lines, b"")
    value = _value(first)
    if isinstance(value, dict):
        return "object" if not second and _wrapped(value) is not None else "lines"
    if isinstance(value, list):
        return "lines" if second else "array"
    if first.startswith(b"["):
        return "array"
    # A line by line file may have a broken first line; an object goes on after an opening bracket or a comma.
    goes_on = not second or first.endswith((b"{", b"[", b","))
    return "object" if first.startswith(b"{") and goes_on and not json_lines_by_name else "lines"


def _value(text: bytes) -> Any:
    """Return the JSON value of a line, None if it is none by itself."""
    try:
        return _DECODER.decode(_decoded(text))
    except (ValueError, RecursionError):
        return None


def _lines(path: Path, blank_lines: list[int]) -> Iterator[bytes]:
    """Give the lines that are not blank, and note in `blank_lines` the row before which a blank one stands."""
    row = blanks = 0
    with _open(path) as file:
        for line in file:
            if line.strip():
                row += 1
                yield line
                continue
            blanks += 1
            if blanks > len(blank_lines):
                blank_lines.append(row)


def _parse_line(line: bytes) -> Row:
    text = _decoded(line).rstrip()
    try:
        return _as_row(_DECODER.decode(text))
    except json.JSONDecodeError as error:
        cut_short = "" if line.endswith(b"\n") else "; the file ends in this line: it may be cut short"
        return BadRow(f"not JSON: {error.msg} at column {error.colno}{cut_short}")
    except RecursionError:
        return BadRow(_TOO_DEEP)


_MAX_DEPTH = 100
_TOO_DEEP = f"nested more than {_MAX_DEPTH} deep"


def _as_row(value: Any) -> Row:
    if _too_deep(value):
        return BadRow(_TOO_DEEP)
    if isinstance(value, (Mapping, BadRow)):
        return value
    shown = json.dumps(value)
    return BadRow(f"not an object with columns: {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _too_deep(value: Any) -> bool:
    """Whether lists and objects stand in one another deeper than any data needs, and than Python can show."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        nodes = [node for node in level if isinstance(node, (dict, list))]
        if not nodes:
            return False
        level = [child for node in nodes for child in (node.values() if isinstance(node, dict) else node)]
    return True


def _array_items(path: Path) -> Iterator[Any]:
    """Give the items of a JSON array one by one, holding no more than some of the file at a time."""
    between = re.compile(r"[\s,]*")
    with _open_text(path) as file:
        text = file.read(1 << 20).lstrip()
        at, row = 1, 0  # behind the opening bracket
        while True:
            at = between.match(text, at).end()  # type: ignore[union-attr]  # matches anywhere
            if text[at : at + 1] == "]":
                return
            problem = "the array does not end"
            try:
                if at < len(text):
                    item, end = _DECODER.raw_decode(text, at)
                    if end < len(text):
                        yield item
                        at, row = end, row + 1
                        continue
            except (ValueError, RecursionError) as error:
                problem = f"not JSON: {getattr(error, 'msg', error)}: {text[at : at + 60]!r}"
            # The item may go on behind what was read so far. Reading as much again keeps the work linear.
            more = file.read(max(1 << 20, len(text) - at))
            if not more:
                raise DataError(f"{path}, row {row}: {problem}")
            text, at = text[at:] + more, 0


def _object_items(path: Path) -> Iterator[Any]:
    """Give the rows of a file that is one object: a wrapper around a list of rows, or a single row."""
    with _open(path) as file:
        text = _decoded(file.read())
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    rows = _wrapped(value) if isinstance(value, dict) else None
    yield from [value] if rows is None else rows


def _wrapped(value: Mapping[str, Any]) -> list[Any] | None:
    """Return the rows of `{"data": [...]}`: the list of objects under a usual name."""
    named = [value[name] for name in ("data", "rows", "examples", "instances", "train") if name in value]
    lists = [rows for rows in named if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return lists[0] if len(lists) == 1 else None


# Tables


def _table_rows(path: Path, delimiter: str) -> Iterator[dict[str, str] | BadRow]:
    """Give a CSV file's rows, every value a text as it stands in the file."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a long answer is longer than the default allows
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}, line 1: not CSV: {error}", "the first line names the columns") from error
        if repeated := [name for name in header if header.count(name) > 1]:
            raise DataError(f"{path}: two columns are named {repeated[0]!r}")
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(f"not CSV: {error}")
                continue
            if len(values) == len(header):
                yield dict(zip(header, values, strict=True))
            elif values:
                yield BadRow(f"{len(values)} fields under a header of {len(header)}")


def _parquet_part(source: int, path: Path, fingerprint: str, streamed: bool) -> Part:
    import pyarrow as pa
    import pyarrow.parquet as pq

    @contextmanager
    def opened() -> Iterator[pq.ParquetFile]:
        content: Path | IO[bytes] = path
        if path.suffix.lower() in (".gz", ".zst"):  # Parquet is read from its end: unpacked first, in memory
            with _damage_explained(path, lambda: "row 0"), _open(path) as packed:
                content = io.BytesIO(packed.read())
        try:
            with pq.ParquetFile(content) as file:
                yield file
        except Exception as error:  # what a damaged file leads to is of any kind
            raise DataError(
                f"{path} is damaged, or no Parquet file: {_first_line(error)}", "copy or download it again"
            ) from error

    def batches(start: int) -> Iterator[Any]:
        """Give the rows from `start` on, some hundred at a time."""
        with opened() as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start >= rows:
                    start -= rows
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    rows -= len(batch)
                    yield batch.slice(start)
                    start = max(0, start - len(batch))
                if rows:  # nothing else would tell
                    raise pa.ArrowInvalid(f"row group {group} ends {rows} rows early")

    with opened() as file:
        names = file.schema_arrow.names
        count = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: two columns are named {repeated[0]!r}")
    held = [] if streamed else list(batches(0))

    def held_batches(start: int) -> Iterator[Any]:
        for batch in held:
            if start < len(batch):
                yield batch.slice(start)
            start = max(0, start - len(batch))

    def read(start: int, wanted: Wanted) -> Iterator[Row | None]:
        for batch in batches(start) if streamed else held_batches(start):
            if any(map(wanted, range(start, start + len(batch)))):
                yield from _rows_of_batch(batch)
            else:
                yield from itertools.repeat(None, len(batch))
            start += len(batch)

    return Part(source, str(path), fingerprint, read, count)


def _rows_of_batch(batch: Any) -> list[Row]:
    """Return a columnar batch's rows; one with a value that Python has none for, or that is no UTF-8, is a bad row."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [BadRow(f"a value cannot be read: {_first_line(error)}")]
        return [row for i in range(len(batch)) for row in _rows_of_batch(batch.slice(i, 1))]


# Fingerprints

_digests: dict[tuple[str, int, int], str] = {}


def _file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, computed once for each state of the file."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


# Datasets, saved by the library or on the hub


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_part(source: int, spec: SourceSpec, usual: Sequence[str], files: Sequence[Path]) -> Part:
    """Open what `save_to_disk` wrote; it is mapped into memory, not read at once, streamed or not."""
    import datasets

    try:
        found = datasets.load_from_disk(str(Path(spec.path).expanduser()))
    except Exception as error:
        raise DataError(f"{spec.path} is not a dataset as `save_to_disk` writes it: {_first_line(error)}") from error
    name = spec.path
    if isinstance(found, datasets.DatasetDict):
        split = _choose_split(list(found), spec, usual)
        found, name = found[split], f"{spec.path} ({split})"
        files = [file for file in files if file.parent.name == split]
    elif spec.split not in (None, str(found.split), "train"):
        raise DataError(f"{spec.path} holds a single split and has no {spec.split!r}", "leave `split` out")
    fingerprint = _digest(_file_digest(file).encode() for file in files)
    return Part(source, name, fingerprint, _dataset_reader(found), len(found))


def _dataset_reader(dataset: Any) -> Reader:
    return lambda start, _: iter(dataset.select(range(start, len(dataset))) if start < len(dataset) else ())


def _hub_part(source: int, spec: SourceSpec, usual: Sequence[str], streamed: bool) -> Part:
    """Open one split of a hub dataset. No code of the dataset's ever runs."""
    import datasets

    builder = _builder(spec, spec.path, spec.revision)
    known = builder.config.data_files or builder.info.splits or {}
    split = _choose_split([str(name) for name in known], spec, usual)
    if streamed and _sliced(split):
        raise DataError(
            f"{spec.path}: a slice of a split, {split!r}, cannot be streamed",
            "set `data.streaming: false`, or use `max_pairs`",
        )
    try:
        dataset = datasets.load_dataset(spec.path, spec.name, split=split, revision=spec.revision, streaming=streamed)
    except Exception as error:
        raise _library_error(spec, error) from error
    name = f"{spec.path} ({split})"
    fingerprint = f"{spec.path} {spec.name} {split} {builder.hash}"  # the hash is the commit's
    if not streamed:
        return Part(source, name, fingerprint, _dataset_reader(dataset), len(dataset))

    def read(start: int, _: Wanted) -> Iterator[Row]:
        row = start
        try:
            for item in dataset.skip(start) if start else dataset:
                yield item
                row += 1
        except Exception as error:
            if row == start:
                raise _library_error(spec, error) from error
            hint = "if it was the network, `orpo train --resume` goes on from the last checkpoint"
            raise RunError(f"{name}, row {row}: the stream broke off: {_first_line(error)}", hint) from error

    return Part(source, name, fingerprint, read)


def _builder(spec: SourceSpec, path: str, revision: str | None) -> Any:
    """Let `datasets` find out what a directory or hub dataset holds, without loading it."""
    import datasets

    try:
        return datasets.load_dataset_builder(path, spec.name, revision=revision)
    except Exception as error:
        raise _library_error(spec, error) from error


def _library_error(spec: SourceSpec, error: Exception) -> DataError:
    """Put a failure of `datasets` into the user's terms."""
    from datasets.exceptions import DatasetNotFoundError

    text, path = _first_line(error), Path(spec.path).expanduser()
    access = "log in with `hf auth login` or set HF_TOKEN"
    # A path with a slip in it looks like a hub id, too.
    here = f"; as a local path: {_nearest(path)}" if path.parent.is_dir() else ""
    if isinstance(error, ConnectionError) and _offline():
        return DataError(
            f"{spec.path} is not in the hub's local cache, and HF_HUB_OFFLINE forbids to download it",
            f"unset HF_HUB_OFFLINE, or give the path of local files{here}",
        )
    if isinstance(error, ConnectionError):
        return DataError(
            f"the hub cannot be reached for {spec.path}: {text}",
            f"check the network, or give the path of local files{here}",
        )
    if "gated" in text:
        terms = f"accept its terms at https://huggingface.co/datasets/{spec.path}"
        return DataError(f"the hub dataset {spec.path} is gated", f"{terms}, then {access}")
    if isinstance(error, DatasetNotFoundError) and "Revision" in text:
        return DataError(f"the hub dataset {spec.path} has no revision {spec.revision!r}")
    if isinstance(error, DatasetNotFoundError):
        return DataError(
            f"there is no file, directory or hub dataset {spec.path}, or it is private",
            f"check the spelling; if it is private, {access}{here}",
        )
    if names := re.search(r"(?:Available|available configs): \[(.*)\]", str(error)):
        lacks = "has several configurations" if spec.name is None else f"has no configuration {spec.name!r}"
        return DataError(f"{spec.path} {lacks}", f"set `name` to one of {names[1]}")
    if "scripts are no longer supported" in text:
        return DataError(
            f"{spec.path} is a loading script, and code from the hub is not run",
            "its rows may exist as Parquet: set `revision: refs/convert/parquet`",
        )
    if path.is_dir():
        return DataError(f"{spec.path}: its dataset card cannot be followed: {text}")
    return DataError(
        f"{spec.path} cannot be read: {text}",
        "if its rows are of different shapes, download the files and give their directory as the path",
    )


def _choose_split(names: Sequence[str], spec: SourceSpec, usual: Sequence[str]) -> str:
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


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path) is not None and _kind(Path(path)) is None


def _sliced(split: str | None) -> bool:
    return split is not None and not re.fullmatch(r"[\w.-]+", split)


def _offline() -> bool:
    from datasets import config

    return bool(config.HF_HUB_OFFLINE)


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if type(error).__name__.startswith("DatasetGeneration") else None
    lines = str(cause or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
