"""Files that are there whole or not at all, and JSON that is the same text for the same value."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the directory `target` with what `fill` writes into it, atomically; one already there is replaced.

    Raises OSError where the machine refuses, a full disk say; what was half written then goes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        fill(unfinished)
    except Exception as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # safetensors says what the system said only in words: "I/O error: No space left on device (os error 28)".
        if said := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(target)) from error
        raise
    for path in sorted(unfinished.rglob("*")):
        sync(path)
    sync(unfinished)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():  # a directory cannot be renamed onto one that is not empty
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    unfinished.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_file(target: Path, text: str) -> None:
    """Write a text file atomically."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    sync(unfinished)
    unfinished.replace(target)
    sync(target.parent)


def to_json(value: Any) -> str:
    """JSON with sorted keys, the same text for the same value."""
    return json.dumps(_finite(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def to_json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One object a line, its keys in their own order."""
    return "".join(json.dumps(_finite(row)) + "\n" for row in rows)


def _finite(value: Any) -> Any:
    """The value with null for the numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Bring a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
