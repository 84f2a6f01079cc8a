"""What the `datasets` library reads: saved datasets, datasets of the hub, and what a dataset card says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orpo_cli.data.names import choose_split, is_sliced, nearest
from orpo_cli.data.readers import file_digest, first_line
from orpo_cli.data.rows import Part, Reader, Row, SourceSpec, Wanted, digest
from orpo_cli.errors import DataError, RunError


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory is what `save_to_disk` writes."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def saved_part(source: int, spec: SourceSpec, usual: Sequence[str], files: Sequence[Path]) -> Part:
    """Open what `save_to_disk` wrote; it is mapped into memory, not read at once, streamed or not."""
    import datasets

    try:
        found = datasets.load_from_disk(str(Path(spec.path).expanduser()))
    except Exception as error:
        raise DataError(f"{spec.path} is not a dataset as `save_to_disk` writes it: {first_line(error)}") from error
    name = spec.path
    if isinstance(found, datasets.DatasetDict):
        split = choose_split(list(found), spec, usual)
        found, name = found[split], f"{spec.path} ({split})"
        files = [file for file in files if file.parent.name == split]
    elif spec.split not in (None, str(found.split), "train"):
        raise DataError(f"{spec.path} holds a single split and has no {spec.split!r}", "leave `split` out")
    fingerprint = digest(file_digest(file).encode() for file in files)
    return Part(source, name, fingerprint, _dataset_reader(found), len(found))


def _dataset_reader(dataset: Any) -> Reader:
    return lambda start, _: iter(dataset.select(range(start, len(dataset))) if start < len(dataset) else ())


def hub_part(source: int, spec: SourceSpec, usual: Sequence[str], streamed: bool) -> Part:
    """Open one split of a hub dataset. No code of the dataset's ever runs."""
    import datasets

    builder = builder_of(spec, spec.path, spec.revision)
    known = builder.config.data_files or builder.info.splits or {}
    split = choose_split([str(name) for name in known], spec, usual)
    if streamed and is_sliced(split):
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
            raise RunError(f"{name}, row {row}: the stream broke off: {first_line(error)}", hint) from error

    return Part(source, name, fingerprint, read)


def builder_of(spec: SourceSpec, path: str, revision: str | None) -> Any:
    """Let `datasets` find out what a directory or hub dataset holds, without loading it."""
    import datasets

    try:
        return datasets.load_dataset_builder(path, spec.name, revision=revision)
    except Exception as error:
        raise _library_error(spec, error) from error


def _library_error(spec: SourceSpec, error: Exception) -> DataError:
    """Put a failure of `datasets` into the user's terms."""
    from datasets.exceptions import DatasetNotFoundError

    text, path = first_line(error), Path(spec.path).expanduser()
    access = "log in with `hf auth login` or set HF_TOKEN"
    # A path with a slip in it looks like a hub id, too.
    here = f"; as a local path: {nearest(path)}" if path.parent.is_dir() else ""
    if isinstance(error, ConnectionError) and is_offline():
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


def is_offline() -> bool:
    """Whether the user has forbidden the hub."""
    from datasets import config

    return bool(config.HF_HUB_OFFLINE)
