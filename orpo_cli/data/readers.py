"""The rows of one file: JSON, JSON lines, CSV and Parquet, packed or not.

JSON and CSV are read here, value by value, for what a columnar reader cannot keep: texts that look like dates or nulls,
a column with strings in one row and lists in another, one broken line among good ones.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

from orpo_cli.data.rows import BadRow, Part, Row, Wanted, every_row, row_in_file
from orpo_cli.errors import DataError

_KINDS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}


READABLE = ".json, .jsonl, .ndjson, .csv, .tsv or .parquet, also packed as .gz or .zst"


def kind_of(path: Path) -> str | None:
    """Return the kind of file that the name tells, None for one that cannot be read."""
    packed = path.suffix.lower() in (".gz", ".zst")
    return _KINDS.get((path.with_suffix("") if packed else path).suffix.lower())


def file_part(source: int, path: Path, streamed: bool) -> Part:
    """Open a file, held in memory unless it is streamed. Raises `DataError` for one that cannot be read."""
    blank_lines: list[int] = []
    with _damage_explained(path, lambda: "row 0"):
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs.github.com/spec"):
                raise DataError(f"{path} is a Git LFS pointer, not the data", "fetch the data with `git lfs pull`")
        fingerprint = file_digest(path)
        if kind_of(path) == "parquet":
            return _parquet_part(source, path, fingerprint, streamed)
        items, parse = _reader(path, blank_lines)
    lines = blank_lines if parse is _parse_line else None

    def read(start: int, wanted: Wanted) -> Iterator[Row | None]:
        row = 0
        with _damage_explained(path, lambda: row_in_file(row, lines)):
            for item in items():
                if row >= start:
                    yield parse(item) if wanted(row) else None
                row += 1

    if streamed:
        return Part(source, str(path), fingerprint, read, blank_lines=lines)
    held = list(read(0, every_row))
    return Part(source, str(path), fingerprint, lambda start, _: iter(held[start:]), len(held), blank_lines=lines)


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
    kind = kind_of(path)
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
    json_lines_by_name = kind_of(path) == "jsonl"
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
        return BadRow(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{cut_short}")
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
                f"{path} is damaged, or no Parquet file: {first_line(error)}", "copy or download it again"
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
            return [BadRow(f"a value cannot be read: {first_line(error)}")]
        return [row for i in range(len(batch)) for row in _rows_of_batch(batch.slice(i, 1))]


_digests: dict[tuple[str, int, int], str] = {}


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes, computed once for each state of the file."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or of what is behind it."""
    cause = error.__cause__ if type(error).__name__.startswith("DatasetGeneration") else None
    lines = str(cause or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
