"""The run directory: what lies where, whether it may be used, and the manifest."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from orpo_cli.errors import InputError
from orpo_cli.files import make_directory, recover_all, remove
from orpo_cli.recipe import Recipe, load_recipe
from orpo_cli.terminal import warn

# What a run writes, and --overwrite removes; anything else in the directory is the user's and stays.
FILES = (
    "recipe.yaml",
    "manifest.json",
    "metrics.jsonl",
    "samples.jsonl",
    "eval.json",
    "eval.pairs.jsonl",
    "eval.start.pairs.jsonl",
    "report.html",
)
DIRECTORIES = ("checkpoints", "adapter", "merged", "trackers")
# Who writes here; gone when nobody does, unless it was killed.
LOCK = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run's files (INTERFACE of the tool: users and programs rely on them)."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, devices, seeds, data fingerprints and counts."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Answers to `train.sample_prompts`."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter (LoRA runs)."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """The full model."""
        return self.path / "merged"

    @property
    def eval(self) -> Path:
        """Held-out metrics."""
        return self.path / "eval.json"

    @property
    def eval_pairs(self) -> Path:
        """Held-out metrics of each pair."""
        return self.path / "eval.pairs.jsonl"

    @property
    def start_pairs(self) -> Path:
        """The same before the first step."""
        return self.path / "eval.start.pairs.jsonl"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def trackers(self) -> Path:
        """What `output.trackers` write."""
        return self.path / "trackers"

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return any(path.exists() for path in self.parts())

    @contextmanager
    def claimed(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Hold the directory for a run that nothing else may write into; what a kill left half done in it is mended.

        Nothing is deleted yet: `clear` does that once all else is known to be right. Raises InputError for a directory
        that cannot be written, that another process holds, or that has a run and no option says what to do with it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file", "name another directory with --output-dir")
        whole = self.path.resolve()
        for parent, child in pairwise([*reversed(whole.parents), whole]):
            if child.name in DIRECTORIES and (parent / "manifest.json").is_file():
                raise InputError(f"{self.path} lies inside the run {parent}", "name another directory")
        for path in self.parts():
            if path.is_symlink():
                raise InputError(
                    f"{path} is a link, and a run writes nothing outside of its directory",
                    "remove the link; a run that needs more room takes another --output-dir",
                )
        made = not self.path.exists()
        try:
            with held(self.path / LOCK, self.path):
                if self.holds_run() and not (resume or overwrite):
                    raise InputError(
                        f"{self.path} already holds a run",
                        "--resume goes on with it, --overwrite starts anew, --output-dir names another directory",
                    )
                recover_all(self.path, (*FILES, *DIRECTORIES).__contains__)
                yield
        except InputError:
            if made:  # a run that is refused leaves no empty directory
                with suppress(OSError):
                    self.path.rmdir()
            raise

    def parts(self) -> list[Path]:
        """All that a run writes, there or not."""
        return [self.path / name for name in (*DIRECTORIES, *FILES)]

    def clear(self) -> None:
        """Remove the run that is here, and nothing else."""
        for path in self.parts():  # without checkpoints, what a kill leaves of it cannot be gone on with
            remove(path)


@contextmanager
def held(lock: Path, what: Path) -> Iterator[None]:
    """Let no other process write `what` meanwhile, by a lock that the kernel opens when this one ends, however it does.

    The file `lock` says who holds it. Raises InputError where another process does, or where it cannot be made.
    """
    while True:
        try:
            make_directory(lock.parent)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{lock.parent} cannot be made or written to: {error.strerror}", "name another directory"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise InputError(
                f"{what} is in use: {holder} writes there", "wait until it has ended, or name another directory"
            ) from None
        except OSError as error:
            warn(f"{what} cannot be locked ({error.strerror}): see to it that nothing else writes there")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        os.close(descriptor)  # who held it before has just deleted the file: it locks nothing any more
    try:
        with suppress(OSError):  # a full disk says so elsewhere
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                lock.unlink()
        os.close(descriptor)


def open_run(path: Path) -> tuple[RunDirectory, Recipe]:
    """A finished run and its recipe. Raises InputError if there is none."""
    run = RunDirectory(path)
    if not run.recipe.is_file():
        raise InputError(f"{path} holds no run: it has no recipe.yaml", "name the directory given by output.dir")
    return run, load_recipe(run.recipe)


def day_of(run: RunDirectory) -> str | None:
    """The day that the template of a run has been told it is; None where it does not ask, or there is no run."""
    if not run.recipe.is_file():
        return None
    day = load_recipe(run.recipe).model.chat_template_date
    return None if day == "auto" else day


def read_manifest(run: RunDirectory) -> dict[str, Any]:
    """The run's manifest, empty if it has none. Raises InputError for one that someone has spoilt."""
    return _read_object(run.manifest, "begin a new run, or delete the file and go on with --resume --allow-changes")


def read_eval(run: RunDirectory) -> dict[str, Any]:
    """The run's held-out figures, empty if it has none. Raises InputError for a file that someone has spoilt."""
    return _read_object(run.eval, f"orpo eval {run.path} --output {run.eval} writes it anew")


def _read_object(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object of a file, empty where there is none. Raises InputError, with the hint, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}", hint) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it holds no object", hint)
    return found
