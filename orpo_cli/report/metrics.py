"""`metrics.jsonl`, the authoritative record of a run: one JSON object a logged step or evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo_cli.files import to_json_lines

# What two equal runs may differ in; see `orpo_cli.report.metrics.comparable`.
TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")


class MetricsFile:
    """Appends rows; can be cut back to a length noted earlier, so that a resumed run writes no step twice."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """Open `path` for appending after its first `length` bytes; what follows them is dropped."""
        path.touch()
        os.truncate(path, min(length, path.stat().st_size))  # a file cut shorter by someone is not filled up with NUL
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers that JSON cannot hold (NaN, infinities) become null."""
        self._file.write(to_json_lines([row]))
        self._file.flush()

    def sync(self) -> int:
        """Bring all rows to the disk; the file's length in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def comparable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its times and memory: equal in two equal runs."""
    return {k: v for k, v in row.items() if k.removeprefix("eval_") not in TIMES}
