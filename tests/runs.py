"""Comparing two runs' directories: what must be equal to the byte, and what may differ."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import torch
import yaml

from orpo_cli.metrics import comparable, read_metrics


def rows(run: Path) -> list[dict]:
    """The run's metrics without times and memory."""
    return [comparable(row) for row in read_metrics(run / "metrics.jsonl")]


def losses(run: Path) -> torch.Tensor:
    """The loss of each step."""
    return torch.tensor([row["loss"] for row in rows(run) if "loss" in row])


def contents(directory: Path) -> dict[Path, bytes]:
    """All files below a directory, with their bytes."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def same_files(one: Path, other: Path, *, checkpoints: bool = True) -> None:
    """The same files are in both runs and equal to the byte, but for the output directory, times, memory and command.

    Without `checkpoints`, of those only the newest is looked at: a run that a signal stopped has made one more.
    """
    names, others = (
        {
            p.relative_to(run)
            for p in run.rglob("*")
            if p.is_file()
            and (checkpoints or "checkpoints" not in p.parts or max(run.glob("checkpoints/*")) in p.parents)
        }
        for run in (one, other)
    )
    assert names == others, sorted(map(str, names ^ others))
    for name in sorted(names):
        if name.name in _READ:
            assert _READ[name.name](one / name) == _READ[name.name](other / name), name
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _recipe(path: Path) -> Any:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    del recipe["output"]["dir"]
    return recipe


def _manifest_of_run(path: Path) -> Any:
    """All but how the run was called and how often gone on with, and what else the process and the machine held."""
    manifest = {key: value for key, value in _json(path).items() if key not in ("command", "resumed")}
    memory = manifest["memory"]
    del memory["available_bytes"], memory["estimated_bytes"]["process"], memory["estimated_bytes"]["total"]
    return manifest


def _report(path: Path) -> str:
    """The whole page but for the directory's name and the command."""
    directory = yaml.safe_load((path.parent / "recipe.yaml").read_text(encoding="utf-8"))["output"]["dir"]
    page = path.read_text(encoding="utf-8").replace(escape(directory), "RUN")
    return re.sub(r'(<th scope="row">command</th><td>)[^<]*', r"\1", page)


def _state(path: Path) -> Any:
    """All but the length of metrics.jsonl, in which times have more digits or fewer."""
    return {key: value for key, value in _json(path).items() if key != "metrics_length"}


def _manifest(path: Path) -> Any:
    files = _json(path)["files"]
    return {name: entry for name, entry in files.items() if name != "state.json"}


_READ = {
    "report.html": _report,
    "recipe.yaml": _recipe,
    "manifest.json": _manifest_of_run,
    "metrics.jsonl": lambda path: rows(path.parent),
    "state.json": _state,
    "MANIFEST.json": _manifest,
}
