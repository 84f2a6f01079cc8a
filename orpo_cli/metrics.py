"""`metrics.jsonl`, the authoritative record of a run: one JSON object a logged step or evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orpo_cli.errors import RunError
from orpo_cli.files import to_json_lines, write_file
from orpo_cli.terminal import warn

# What two equal runs may differ in; see `comparable`.
TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")


class MetricsFile:
    """Appends rows; can be cut back to a length noted earlier, so that a resumed run writes no step twice."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """Open `path` for appending after its first `length` bytes, or the whole rows among them; the rest is dropped.

        Raises OSError where the machine refuses; it names the file.
        """
        self.path = path
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        self._directory = os.open(path.parent, os.O_RDONLY)
        self._open(whole_rows(path, length))

    def _open(self, length: int) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._file, length)
        self._length = length

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, whole or not at all; numbers that JSON cannot hold (NaN, infinities) become null.

        The listeners are then given it too.
        """
        rest = memoryview(to_json_lines([row]).encode())
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, self._length)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._length = os.fstat(self._file).st_size
        for listener in self.listeners:
            listener(row)

    def sync(self) -> int:
        """Bring all rows to the disk, into a new file if this one was deleted; the file's length in bytes.

        Raises RunError if the directory is not there any more.
        """
        if not _is_at(self._directory, self.path.parent):
            raise RunError(
                f"{self.path.parent} was moved or deleted while the run went on",
                "put it back, and go on from its last checkpoint with --resume",
            )
        if not _is_at(self._file, self.path):
            rows = os.pread(self._file, self._length, 0)
            os.close(self._file)
            write_file(self.path, rows.decode())
            self._open(self._length)
            warn(f"{self.path} was deleted or replaced while the run went on: written anew")
        try:
            os.fsync(self._file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return self._length

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        os.close(self._directory)


def whole_rows(path: Path, length: int) -> int:
    """Bytes of the rows that lie whole within the first `length` bytes of a file; 0 where there is no file."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return file.read(length).rfind(b"\n") + 1


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether what was opened is still what lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of lines, up to a last one that is being written or was cut off; none without the file."""
    found = []
    with suppress(OSError, ValueError), path.open(encoding="utf-8") as lines:
        for line in lines:
            found.append(json.loads(line))
    return found


def comparable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its times and memory: equal in two equal runs."""
    return {k: v for k, v in row.items() if k.removeprefix("eval_") not in TIMES}
