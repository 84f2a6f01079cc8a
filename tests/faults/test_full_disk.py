"""A full disk, at whatever write: exit code 1 and an explanation; with room again the run goes on to the same end."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import resize
from tests.faults.harness import Fault, Runs, Started, is_sound, tally

# Into which the calls at which a disk fills up are divided.
PARTS = 8
# Of the disk, in KiB; the tiny runs need some 700 in all.
SIZES = [16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768]


def explained(started: Started) -> None:
    """The run failed and said why."""
    assert started.wait() == 1, started.output()
    assert re.search(r"^error: .*(No space left on device|GiB free)", started.output(), re.MULTILINE)
    assert "Traceback" not in started.output()


def full_at_calls(runs: Runs, kind: str, directory: Path, first: int, every: int) -> None:
    """Fill the disk at each `every`-th change that the last steps make to a file, from the `first` on, and resume."""
    if runs.why_no_shim:
        pytest.skip(runs.why_no_shim)
    run, record = directory / "run", directory / "record"
    recipe = runs.recipe(kind, run)

    def start(call: int) -> Started:
        shutil.copytree(runs.last_steps(kind), run)
        return runs.start(recipe, "--resume", fault=Fault(run, record, call=call, full=True, mechanism="libc"))

    undisturbed = start(0)
    assert undisturbed.wait() == 0
    changes = [line.split()[0] for line in record.read_text().splitlines()]
    takes_room = [i for i, name in enumerate(changes, 1) if name not in ("unlink", "unlinkat", "rmdir")]
    for call in takes_room[first::every]:
        shutil.rmtree(run)
        explained(start(call))
        is_sound(run)
        runs.finish(recipe, "--resume")
        runs.reference(kind).equals(run)
        tally[f"full disks at a {changes[call - 1]}"] += 1


def test_a_full_disk_at_some_calls(runs, tmp_path):
    full_at_calls(runs, "file-lora", tmp_path, first=5, every=50)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", ["file-lora", "stream-full"])
def test_a_full_disk_at_each_call(runs, kind, part, tmp_path):
    full_at_calls(runs, kind, tmp_path, first=part, every=PARTS)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["file-lora", "file-full"])
def test_a_real_disk_that_fills_up(runs, kind, disk):
    """Of every size up to what a run needs: with a little more each time it fills up at another moment."""
    failed = 0
    for kib in SIZES:
        resize(disk, kib)
        run = disk / "run"
        recipe = runs.recipe(kind, run)
        started = runs.start(recipe)
        if started.wait() != 0:
            explained(started)
            is_sound(run)
            resize(disk, 65536)
            runs.finish(recipe, "--resume")
            failed += 1
        runs.reference(kind).equals(run)
        shutil.rmtree(run)
    tally[f"small file systems that filled up, {kind}"] += failed
    assert failed > len(SIZES) / 2
