"""Files that are there whole or not at all, and JSON that is the same text for the same value.

What is written lies beside its target, under a name with a dot, until all of it is on the disk; one rename then makes
it exist. A kill may leave such a name behind; `recover` knows what to do with it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orpo_cli.errors import RunError

# What lies beside a target while it is written, replaced or deleted: `.NAME.unfinished`, say.
UNFINISHED, REPLACED, DELETED = "unfinished", "replaced", "deleted"
# Linux: renameat2's flag, and its word for the working directory.
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the directory `target` with what `fill` writes into it, atomically; one already there is replaced.

    Raises OSError where the machine refuses, a full disk say, and names `target`; what was half written then goes.
    """
    recover(target)
    make_directory(target.parent)
    unfinished = _beside(target, UNFINISHED)
    with _undone_on_failure(target):
        unfinished.mkdir()
        fill(unfinished)
        for path in sorted(unfinished.rglob("*")):
            sync(path)
        sync(unfinished)
        if not os.path.lexists(target):
            unfinished.rename(target)
        elif not _exchange(unfinished, target):  # a directory cannot be renamed onto one that is not empty
            target.rename(_beside(target, REPLACED))
            unfinished.rename(target)
        sync(target.parent)
    _discard(_beside(target, REPLACED), target)
    _delete(unfinished)  # after an exchange, the old one


def write_file(target: Path, text: str) -> None:
    """Write a text file atomically; into a device or a pipe, just so. Raises OSError as `write_directory` does."""
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    unfinished = _beside(target, UNFINISHED)
    with _undone_on_failure(target):
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(target)
        sync(target.parent)


def remove(target: Path) -> None:
    """Delete a file, a link or a directory; a kill in the midst leaves nothing half deleted under its name."""
    if os.path.lexists(target):
        _discard(target, target)


def recover(target: Path) -> None:
    """Clean up what a kill left beside `target`; one that was about to be replaced, with nothing in its place, is back.

    Only for who alone may write there: what another process is writing looks the same.
    """
    replaced = _beside(target, REPLACED)
    if os.path.lexists(replaced) and not os.path.lexists(target):
        replaced.rename(target)
        sync(target.parent)
    _discard(replaced, target)
    _delete(_beside(target, UNFINISHED))


def recover_all(directory: Path, is_ours: Callable[[str], bool]) -> None:
    """Recover every target in a directory whose name is known to be ours."""
    left = re.compile(rf"\.(.+)\.(?:{UNFINISHED}|{REPLACED}|{DELETED})")
    names = {found[1] for path in directory.iterdir() if (found := left.fullmatch(path.name))}
    for name in sorted(filter(is_ours, names)):
        recover(directory / name)


def make_directory(path: Path) -> None:
    """Make a directory and those above it that are missing, each brought to the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def require_space(directory: Path, needed: int, what: str, *, given_up: Iterable[Path] = ()) -> None:
    """Raise RunError where the disk that a directory is on, or will be, has no room for so many bytes.

    What lies in `given_up`, on that disk, is to be deleted before they are written.
    """
    there = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    files = (file for path in given_up for file in (path, *path.rglob("*")) if file.is_file() and not file.is_symlink())
    free = shutil.disk_usage(there).free + sum(file.stat().st_size for file in files)
    if free < needed:
        raise RunError(
            f"{directory}: {os.strerror(errno.ENOSPC)} for {what}: it takes {needed / 2**30:,.4g} GiB, "
            f"and {free / 2**30:,.4g} GiB are free",
            "make room there, or name another directory; what was saved before is sound",
        )


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")


def _discard(path: Path, target: Path) -> None:
    """Delete `path`, which is `target` or an older one, under a name that nobody takes for it any more."""
    deleted = _beside(target, DELETED)
    _delete(deleted)
    if os.path.lexists(path):
        path.rename(deleted)
        sync(target.parent)
        _delete(deleted)


def _delete(path: Path) -> None:
    """Delete what nobody looks for any more; what cannot go now, goes another time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system knows no such thing."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def _undone_on_failure(target: Path) -> Iterator[None]:
    """Leave `target` as it was, and nothing beside it, when it cannot be written; say that it was this one."""
    try:
        yield
    except BaseException as error:  # also when a signal ends the program
        with suppress(OSError):
            recover(target)
        number = error.errno if isinstance(error, OSError) else None
        # Libraries in Rust say what the system said only in words: "No space left on device (os error 28)".
        if said := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(said[1])
        named = getattr(error, "filename", None)
        if number is None or (named is not None and _beside(target, UNFINISHED).name not in str(named)):
            raise
        raise OSError(number, os.strerror(number), str(target)) from error


def to_json(value: Any) -> str:
    """JSON with sorted keys, the same text for the same value."""
    text = json.dumps(_finite(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # A lone surrogate, in data or in the name of a file, has no bytes in UTF-8: it is written as JSON's \ud800.
    return text.encode("utf-8", "backslashreplace").decode()


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
    """Bring a file or a directory's entries to the disk. Raises OSError that names it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
