"""Checkpoints that are there whole or not at all.

    checkpoints/step-000100/   adapter_model.safetensors or model.safetensors, optimizer.safetensors, state.json,
                               MANIFEST.json (sha256 and size of each file)

A checkpoint is written beside its final name, every file and directory is synced to disk, and one rename makes it
exist. Nothing is ever unpickled: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orpo_cli.errors import InputError
from orpo_cli.files import recover_all, remove, to_json, write_directory

MANIFEST = "MANIFEST.json"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
_NAME = re.compile(r"step-(\d{6,})$")


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    write_weights: Callable[[Path], None],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    protect: int | None = None,
) -> Path:
    """Write checkpoints/step-NNNNNN, then delete all but the newest `keep` once the new one verifies.

    `write_weights` puts adapter or model safetensors into a directory. `protect` is the step of a checkpoint that is
    never deleted (the best so far) and not counted. Returns the checkpoint's directory.
    """
    target = checkpoint_of(directory, step)

    def fill(unfinished: Path) -> None:
        write_weights(unfinished)
        save_file(_contiguous(optimizer), unfinished / "optimizer.safetensors")
        (unfinished / "state.json").write_text(to_json(state), encoding="utf-8")
        files = sorted(path.name for path in unfinished.iterdir())
        entries = {f: {"bytes": (unfinished / f).stat().st_size, "sha256": _sha256(unfinished / f)} for f in files}
        (unfinished / MANIFEST).write_text(to_json({"files": entries, "step": step}), encoding="utf-8")

    write_directory(target, fill)
    if fault(target) is None:
        delete_surplus(directory, step, keep=keep, protect=protect)
    return target


def delete_surplus(directory: Path, step: int, *, keep: int, protect: int | None) -> None:
    """Delete all of the checkpoints before that of `step` but the newest, `keep` with it, and the protected one."""
    older = [c for c in checkpoints(directory) if step_of(c) < step and step_of(c) != protect]
    for surplus in older[: max(0, len(older) - (keep - 1))]:
        remove(surplus)


def give_up_later(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the run goes on from that of `step`, by another course.

    The newest go first, each brought to the disk, so that after a kill in the midst those left are of one course.
    """
    for later in reversed([c for c in checkpoints(directory) if step_of(c) > step]):
        remove(later)


def check_sound(directory: Path) -> None:
    """Raise InputError if any byte of a checkpoint has changed."""
    if (why := fault(directory)) is not None:
        raise InputError(
            f"the checkpoint {directory} is damaged: {why}", "name another one; --resume takes the newest sound one"
        )


def read_state(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint that was found sound."""
    return json.loads((directory / "state.json").read_text(encoding="utf-8"))


def load_weights(directory: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint. Raises InputError if any byte of it has changed."""
    check_sound(directory)
    weights = next(directory / name for name in WEIGHTS if (directory / name).exists())
    try:
        return load_file(weights)
    except SafetensorError as error:
        raise InputError(f"the checkpoint {directory} was not written by orpo: {error}", "name another one") from error


def load_checkpoint(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, optimizer tensors and state of a checkpoint. Raises InputError if any byte of it has changed."""
    weights = load_weights(directory)
    try:
        return weights, load_file(directory / "optimizer.safetensors"), read_state(directory)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"the checkpoint {directory} was not written by orpo: {error}", "name another one") from error


def newest_sound(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each damaged one that is newer than it."""
    damaged: list[str] = []
    for candidate in reversed(checkpoints(directory)):
        why = fault(candidate)
        if why is None:
            return candidate, damaged
        damaged.append(f"{candidate.name}: {why}")
    return None, damaged


def recover_checkpoints(directory: Path) -> None:
    """Clean up what a kill left in a run's `checkpoints/`, while nobody else writes there."""
    if directory.is_dir():
        recover_all(directory, lambda name: _NAME.match(name) is not None)


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints in a run's `checkpoints/`, by step."""
    if not directory.is_dir():
        return []
    return sorted(
        (p for p in directory.iterdir() if _NAME.match(p.name) and p.is_dir() and not p.is_symlink()), key=step_of
    )


def checkpoint_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would."""
    return directory / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was written after."""
    match = _NAME.match(checkpoint.name)
    return int(match[1]) if match else -1


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, every file of it compared with the manifest; None if it is sound."""
    if not checkpoint.is_dir():
        return "it is not there"
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        entries = manifest["files"]
        if text != to_json(manifest) or manifest["step"] != step_of(checkpoint):
            return f"{MANIFEST} has changed since it was written"
        if not {"optimizer.safetensors", "state.json"} < set(entries) or set(entries).isdisjoint(WEIGHTS):
            return f"{MANIFEST} is incomplete"
        for name, entry in entries.items():
            path = checkpoint / name
            if Path(name).name != name or not path.is_file() or path.is_symlink():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
