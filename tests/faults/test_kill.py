"""A run that is killed, at whatever moment, and resumed ends as the one that nothing disturbed."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from orpo_cli.data import dataset
from orpo_cli.data.dataset import load_pairs
from orpo_cli.data.order import Position
from orpo_cli.model.build import load_text_side, pair_tokenizer
from orpo_cli.recipe import load_recipe
from orpo_cli.train.loop import pairs_digest
from tests.faults.harness import BLOCK_ROWS, KINDS, Fault, Runs, is_sound, tally, wait_for_save
from tests.runs import rows

# Chains of three kills for each kind.
CHAINS = 9
KILLS = 3
# Into which the kills at each call are divided.
PARTS = 8


def kill_at_random(runs: Runs, kind: str, run: Path, seed: int) -> None:
    """Three kills in a row, each anywhere in the life of the process or, two in five of them, about a save."""
    reference, generator = runs.reference(kind), random.Random(f"{kind} {seed}")
    recipe, kills = runs.recipe(kind, run), 0
    while kills < KILLS:
        started = runs.start(recipe, "--resume")
        if generator.random() < 0.4:
            wait_for_save(run, started, generator.randint(1, 4))
            time.sleep(generator.uniform(0, 0.02))
        else:
            time.sleep(generator.uniform(0, reference.seconds))
        kills += started.kill()
        is_sound(run)
    runs.finish(recipe, "--resume")
    reference.equals(run)
    tally[f"SIGKILLs at random moments, {kind}"] += kills


@pytest.mark.parametrize("kind", ["file-lora", "stream-full"])
def test_a_chain_of_three_kills(runs, kind, tmp_path):
    kill_at_random(runs, kind, tmp_path / "run", seed=CHAINS)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(CHAINS))
@pytest.mark.parametrize("kind", KINDS)
def test_chains_of_three_kills(runs, kind, seed, tmp_path):
    kill_at_random(runs, kind, tmp_path / "run", seed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_undisturbed_run_takes_every_pair_once_an_epoch(runs, kind, monkeypatch):
    """What the resumed runs are compared with is right, also where an epoch's edge lies within a step."""
    reference = runs.reference(kind)
    recipe = load_recipe(reference.run / "recipe.yaml")
    if recipe.data.streaming is True:
        monkeypatch.setattr(dataset, "BLOCK_ROWS", BLOCK_ROWS)
    training, held_out = load_pairs(recipe.data, pair_tokenizer(recipe, load_text_side(recipe)), recipe.train)
    total = training.total_pairs(recipe.train)
    steps = training.steps(8, seed=42, shuffle=True, start=Position(), total_pairs=total)
    pairs = [pairs for pairs, _ in steps]
    logged = [row for row in rows(reference.run) if "loss" in row]
    assert [row["pairs_digest"] for row in logged] == [pairs_digest(step) for step in pairs]
    order = [pair.index for step in pairs for pair in step]
    assert len(order) == total == 3 * training.pairs
    held = {pair.index for pair in held_out.in_source_order()}
    for epoch in range(3):
        assert sorted({*order[epoch * training.pairs :][: training.pairs], *held}) == list(range(64))


# ---- at every change of a file ----


def kill_at_calls(
    runs: Runs, kind: str, directory: Path, mechanism: str, which: slice, *, go_back: bool = False
) -> None:
    """Kill the last steps of a run at some of the changes they make to a file, and resume.

    They are those of a run that was killed before, or with `go_back` of a finished one that is made to go on from step
    20 with `--resume-from`.
    """
    if mechanism == "libc" and runs.why_no_shim:
        pytest.skip(runs.why_no_shim)
    reference, run, record = runs.reference(kind), directory / "run", directory / "record"
    recipe = runs.recipe(kind, run)
    options = ["--resume-from", str(run / "checkpoints/step-000020")] if go_back else ["--resume"]

    def changes(call: int) -> list[str]:
        """What the last steps changed before they were killed at this call, or in all."""
        shutil.copytree(reference.run if go_back else runs.last_steps(kind), run)
        started = runs.start(recipe, *options, fault=Fault(run, record, call=call, mechanism=mechanism))
        assert started.wait() == (-signal.SIGKILL if call else 0), started.output()
        return record.read_text().splitlines()

    total = len(changes(0))
    reference.equals(run)
    for call in range(1, total + 1)[which]:
        shutil.rmtree(run)
        last = changes(call)[-1]
        is_sound(run)
        runs.finish(recipe, "--resume")
        try:
            reference.equals(run)
        except AssertionError as error:
            raise AssertionError(f"killed at call {call}, {last}") from error
        tally[f"SIGKILLs at a {last.split()[0]} ({mechanism})"] += 1


@pytest.mark.parametrize("mechanism", ["python", "libc"])
def test_a_kill_at_some_calls(runs, tmp_path, mechanism):
    kill_at_calls(runs, "file-lora", tmp_path, mechanism, slice(6, None, 61))


def test_a_kill_at_some_calls_while_a_run_goes_back(runs, tmp_path):
    kill_at_calls(runs, "file-lora", tmp_path, "python", slice(0, 20, 4), go_back=True)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    ("kind", "mechanism"), [("file-lora", "libc"), ("stream-full", "libc"), ("file-full", "python")]
)
def test_a_kill_at_each_call(runs, tmp_path, kind, mechanism, part):
    kill_at_calls(runs, kind, tmp_path, mechanism, slice(part, None, PARTS))


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_a_kill_at_each_call_while_a_run_goes_back(runs, tmp_path, part):
    kill_at_calls(runs, "file-lora", tmp_path, "libc", slice(part, None, PARTS), go_back=True)
