"""A recipe's sources opened: files, directories, globs and the hub, in source order, held in memory or streamed.

A row's position counts over all sources, one after the other, and is the same streamed or not.
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from orpo_cli.data.library import builder_of, hub_part, is_offline, is_saved_dataset, saved_part
from orpo_cli.data.names import choose_split, is_hub_id, is_sliced, nearest
from orpo_cli.data.readers import READABLE, file_part, kind_of
from orpo_cli.data.rows import BadRow, Part, Row, Rows, SourceSpec, Wanted, every_row
from orpo_cli.errors import DataError

STREAM_ABOVE_BYTES = 1 << 30
"""With `streaming: auto`, local files that are larger than this in all are streamed."""


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
        if files is not None and is_saved_dataset(Path(spec.path).expanduser()):
            opened = [saved_part(index, spec, usual, files)]
        elif files is not None:
            opened = [file_part(index, file, stream_files) for file in files]
            streamed |= stream_files
        else:
            stream = streaming is True or (streaming == "auto" and not is_sliced(spec.split) and not is_offline())
            opened = [hub_part(index, spec, usual, stream)]
            streamed |= stream
        if not any(part.holds(0) for part in opened):
            raise DataError(f"{spec.path} holds no rows")
        parts += opened if spec.group_by is None else [_grouped(part, spec.group_by, streamed) for part in opened]
    return Rows(specs, parts, streamed)


def _grouped(part: Part, column: str, streamed: bool) -> Part:
    """Make one row, {column: value, "rows": [...]}, of those that follow one another with one value in a column.

    A row without a value stays alone. To get to a later group, the earlier ones are read.
    """
    first = [row for row in itertools.islice(part.read(0, every_row), 64) if isinstance(row, Mapping)]
    if not any(column in row for row in first):
        known = ", ".join(dict.fromkeys(key for row in first for key in row))
        raise DataError(f"group_by: {part.name} has no column {column!r}", f"it has {known}")

    def value(row: Row | None) -> Any:
        found = row.get(column) if isinstance(row, Mapping) else None
        return object() if found is None else found

    def read(start: int, wanted: Wanted) -> Iterator[Row | None]:
        groups = itertools.groupby(part.read(0, every_row), value)
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
    if spec.revision is not None and (path.exists() or glob.has_magic(spec.path)):
        raise DataError(f"{spec.path} is not on the hub and has no revision {spec.revision!r}", "leave `revision` out")
    if path.is_dir():
        if is_sliced(spec.split):
            raise DataError(f"{spec.path}: only a hub dataset's split can be sliced or summed", "use `max_pairs`")
        if is_saved_dataset(path):
            if spec.name is not None:
                raise DataError(
                    f"{spec.path} is a saved dataset and has no configuration {spec.name!r}", "leave `name` out"
                )
            return sorted(path.rglob("*.arrow"))
        return _directory_files(path, spec, usual)
    if path.is_file():
        if kind_of(path) is None:
            raise DataError(f"{spec.path} is of no kind that can be read", f"files may be {READABLE}")
        files = [path]
    elif glob.has_magic(spec.path):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
        files = sorted(match for match in matches if match.is_file() and kind_of(match))
        if not files:
            raise DataError(f"no data file matches {spec.path}", f"files may be {READABLE}")
    elif is_hub_id(spec.path):
        return None
    else:
        raise DataError(f"there is no file or directory {spec.path}", nearest(path))
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
        splits = builder_of(spec, str(path), revision=None).config.data_files or {}
        split = choose_split([str(name) for name in splits], spec, usual)
        files = sorted(Path(file) for file in splits[split])
        if unread := [file for file in files if kind_of(file) is None]:
            raise DataError(f"{unread[0]} is of no kind that can be read", f"files may be {READABLE}")
        return files
    if spec.name is not None:
        raise DataError(f"{spec.path} has no dataset card with the configuration {spec.name!r}", "leave `name` out")
    files = sorted(file for file in path.rglob("*") if _is_data_file(file, path))
    if not files:
        raise DataError(f"{spec.path} holds no data file", f"files may be {READABLE}")
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
    return named[choose_split(list(named), spec, usual)]


def _is_data_file(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and file.name not in _NO_DATA and kind_of(file) is not None


def _split_in_name(file: Path, root: Path) -> str | None:
    """Return the split that a file's name tells (`train.jsonl`, `test-00000-of-00002.parquet`), or its folder's."""
    if match := _SPLIT_FILE.fullmatch(file.name.split(".")[0]):
        return match[1] or match[2]
    return next((part for part in file.relative_to(root).parts[:-1] if part in _SPLIT_NAMES), None)
