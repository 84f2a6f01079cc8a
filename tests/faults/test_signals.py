"""SIGTERM at any moment: one checkpoint, exit code 143, and the run goes on from there to the same end."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.harness import KINDS, Runs, is_sound, tally

STOPS = 50


def stop_at_random(runs: Runs, kind: str, run: Path, seed: int) -> None:
    """SIGTERM at a random moment after the first log line, until it comes before the end; then go on."""
    reference, generator = runs.reference(kind), random.Random(f"SIGTERM {kind} {seed}")
    recipe = runs.recipe(kind, run)
    code = 0
    while code == 0:  # it had ended before
        started = runs.start(recipe, "--overwrite")
        while not started.output():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, reference.seconds))
        if started.process.is_alive():
            started.process.terminate()
        code = started.wait(seconds=30)
    assert code == 128 + signal.SIGTERM, started.output()
    assert "Traceback" not in started.output()
    is_sound(run)
    runs.finish(recipe, "--resume")
    reference.equals(run, checkpoints=False)  # a stop makes one that the undisturbed run has not
    tally[f"SIGTERMs at random moments, clean exits with 143, {kind}"] += 1


@pytest.mark.parametrize("kind", ["file-lora", "stream-full"])
def test_a_stop_at_a_random_moment(runs, kind, tmp_path):
    stop_at_random(runs, kind, tmp_path / "run", seed=STOPS)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(STOPS))
def test_stops_at_random_moments(runs, seed, tmp_path):
    stop_at_random(runs, list(KINDS)[seed % len(KINDS)], tmp_path / "run", seed)
