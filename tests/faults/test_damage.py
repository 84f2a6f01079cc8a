"""One wrong bit or a missing end in any file of a checkpoint is found before a tensor of it reaches the model."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_cli.errors import InputError
from orpo_cli.train import checkpoint as module
from orpo_cli.train.checkpoint import checkpoints, load_checkpoint, step_of
from tests.faults.harness import Runs, tally

TRUNCATIONS = 100
FLIPS = 20
FILES = {
    "file-lora": [
        "MANIFEST.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ],
    "file-full": ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"],
}
EACH_FILE = [(kind, name) for kind, names in FILES.items() for name in names]


def flipped(content: bytes, generator: random.Random) -> bytes:
    """The content with one of its bits the other way round."""
    damaged = bytearray(content)
    damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def damages(content: bytes, generator: random.Random) -> Iterator[tuple[str, bytes]]:
    """(what was done, the damaged content)"""
    for _ in range(FLIPS):
        yield "bits flipped", flipped(content, generator)
    for length in (0, len(content) - 1, *generator.sample(range(1, len(content) - 1), TRUNCATIONS - 2)):
        yield "truncations", content[:length]


@pytest.mark.parametrize("kind", FILES)
def test_these_are_all_files_of_a_checkpoint(runs, kind):
    for checkpoint in checkpoints(runs.reference(kind).run / "checkpoints"):
        assert sorted(path.name for path in checkpoint.iterdir()) == FILES[kind]


@pytest.mark.parametrize(("kind", "name"), EACH_FILE)
def test_no_tensor_is_read_from_a_damaged_checkpoint(runs, kind, name, tmp_path, monkeypatch):
    newest = checkpoints(runs.reference(kind).run / "checkpoints")[-1]
    target = shutil.copytree(newest, tmp_path / newest.name)
    path = target / name
    monkeypatch.setattr(module, "load_file", lambda file: pytest.fail(f"{file} was read"))
    for done, content in damages(path.read_bytes(), random.Random(name)):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(target)
        tally[f"{done} in checkpoints, found by load_checkpoint"] += 1


def damaged_run(runs: Runs, kind: str, name: str, run: Path, generator: random.Random) -> Path:
    """A finished run whose newest checkpoint has a wrong bit in this file."""
    shutil.copytree(runs.reference(kind).run, run)
    newest = checkpoints(run / "checkpoints")[-1]
    path = newest / name
    path.write_bytes(flipped(path.read_bytes(), generator))
    return newest


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "name"), EACH_FILE)
def test_resume_passes_over_a_damaged_checkpoint_and_says_so(runs, kind, name, tmp_path):
    run = tmp_path / "run"
    newest = damaged_run(runs, kind, name, run, random.Random(kind + name))
    before = step_of(checkpoints(run / "checkpoints")[-2])
    recipe = runs.recipe(kind, run)
    named = runs.start(recipe, "--resume-from", str(newest))
    assert named.wait() == 2, named.output()
    assert f"error: the checkpoint {newest} is damaged" in named.output()
    assert f"step {before + 1}/" not in named.output()
    passed = runs.start(recipe, "--resume")
    assert passed.wait() == 0, passed.output()
    assert f"passed over a damaged checkpoint: {newest.name}" in passed.output()
    assert f"going on after step {before}" in passed.output()
    runs.reference(kind).equals(run)
    tally["checkpoints with a wrong bit, passed over by --resume, refused by --resume-from"] += 1
