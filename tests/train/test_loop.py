"""Signals that come to a run at every moment of its loop: it saves, leaves, and goes on to the same bytes."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from orpo_cli.errors import Stopped
from orpo_cli.recipe import load_recipe
from orpo_cli.train import checkpoint, evaluation, loop
from orpo_cli.train import run as training
from orpo_cli.train.checkpoint import checkpoints
from orpo_cli.train.run import Start, train
from tests.conftest import write_tiny_recipe
from tests.runs import rows, same_files

# Steps and evaluations of three micro-batches, sample answers, and saves that are no evaluation's.
CHANGES = {
    "lora": {"r": 4, "dropout": 0.1},
    "data": {"eval": {"holdout": 8}},
    "train": {
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 2,
        "max_tokens_per_microbatch": 250,
        "sample_prompts": ["Which is larger?", "5 or 6?"],
    },
}


@pytest.fixture(scope="module")
def whole(tiny_base, tiny_pairs, tmp_path_factory) -> Path:
    """The run that no signal came to."""
    directory = tmp_path_factory.mktemp("whole")
    train(load_recipe(write_tiny_recipe(directory / "r.yaml", tiny_base, tiny_pairs, directory / "run", **CHANGES)))
    return directory / "run"


@pytest.fixture(autouse=True)
def without_rehearsal(monkeypatch):
    """Signals come at a numbered call of the loop; those of the rehearsal before it are not to count."""
    monkeypatch.setattr(training, "rehearse", lambda run: None)


def signal_at(monkeypatch, owner: object, name: str, call: int, number: int = signal.SIGTERM) -> None:
    """Have a real signal come in the given call, from 1, of a function."""
    function, calls = getattr(owner, name), []

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, interrupted)


# Where the signal comes, and the step after which it finds the run saved; None: nothing was to be saved.
MOMENTS: dict[str, tuple[object, str, int, int | None]] = {
    "in the base's evaluation": (evaluation, "score_in_parts", 1, None),
    "in the base's sample answers": (evaluation, "answer_together", 1, None),
    "in the first step's gradients": (loop, "orpo_loss", 2, 1),
    "in accumulation": (loop, "orpo_loss", 11, 4),
    "before an evaluation": (loop, "evaluate", 2, 3),
    "at an evaluation's end": (evaluation, "evaluation_row", 2, 3),
    "in a save": (checkpoint, "write_directory", 1, 2),
    "in the last evaluation": (loop, "evaluate", 3, 6),
    "at the last evaluation's end": (evaluation, "evaluation_row", 3, 6),
    "in the last save": (loop, "checkpoint", 5, 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_saves_and_the_run_goes_on_to_the_same_bytes(
    tiny_recipe, tmp_path, whole, monkeypatch, moment
):
    owner, name, call, saved = MOMENTS[moment]
    recipe = load_recipe(tiny_recipe(**CHANGES))
    with monkeypatch.context() as once:
        signal_at(once, owner, name, call)
        with pytest.raises(Stopped) as caught:
            train(recipe)
    assert caught.value.exit_code == 143
    assert caught.value.message == "stopped by SIGTERM " + (
        f"after step {saved}; all is saved, and --resume goes on" if saved else "before step 1; nothing is to save"
    )
    found = checkpoints(tmp_path / "run/checkpoints")
    assert [path.name for path in found][-1:] == ([f"step-{saved:06d}"] if saved else [])
    train(recipe, Start(resume=True))
    same_files(whole, tmp_path / "run", checkpoints=False)


def test_an_evaluation_is_given_up_and_made_after_a_resume(tiny_recipe, tmp_path, monkeypatch):
    """The signal comes in its second micro-batch of eight; the checkpoint says that the evaluation is due."""
    budget = {"max_tokens_per_microbatch": 1, "eval_on_start": False, "sample_prompts": []}
    recipe = load_recipe(tiny_recipe(**{**CHANGES, "train": {**CHANGES["train"], **budget}}))
    score_in_parts, made = evaluation.score_in_parts, []

    def late(*arguments, **keywords):
        for tokens in score_in_parts(*arguments, **keywords):
            made.append(tokens)
            if len(made) == 2:
                os.kill(os.getpid(), signal.SIGHUP)
            yield tokens

    with monkeypatch.context() as once:
        once.setattr(evaluation, "score_in_parts", late)
        with pytest.raises(Stopped, match="SIGHUP after step 3") as caught:
            train(recipe)
    assert caught.value.exit_code == 143
    assert len(made) == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    state = json.loads((tmp_path / "run/checkpoints/step-000003/state.json").read_text())
    assert (state["step"], state["evaluated"]) == (3, -1)
    with monkeypatch.context() as once:
        signal_at(once, loop, "orpo_loss", 1)
        with pytest.raises(Stopped):
            train(recipe, Start(resume=True))
    found = [(row["step"], "eval_loss" in row) for row in rows(tmp_path / "run")]
    assert found == [(1, False), (2, False), (3, False), (3, True), (4, False)]


def test_nothing_is_saved_twice(tiny_recipe, tmp_path, monkeypatch):
    """A signal before the first step after a resume finds everything saved."""
    recipe = load_recipe(tiny_recipe(**CHANGES))
    with monkeypatch.context() as once:
        signal_at(once, loop, "orpo_loss", 11)
        with pytest.raises(Stopped):
            train(recipe)
    saved = tmp_path / "run/checkpoints/step-000004"
    made = saved.stat().st_ino
    with monkeypatch.context() as once:
        signal_at(once, loop, "conclude_step", 1)
        with pytest.raises(Stopped, match="after step 4"):
            train(recipe, Start(resume=True))
    assert checkpoints(saved.parent)[-1] == saved
    assert saved.stat().st_ino == made


def test_data_that_does_not_come_is_not_waited_for(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("orpo_cli.train.ahead._PATIENCE", 0.1)
    recipe, hangs = load_recipe(tiny_recipe(data={"streaming": True})), threading.Event()
    steps_to_come = loop.steps_to_come

    def hanging(run):
        for step, data in enumerate(steps_to_come(run), start=1):
            if step == 3:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
                hangs.wait()
            yield data

    monkeypatch.setattr(loop, "steps_to_come", hanging)
    started = time.monotonic()
    with pytest.raises(Stopped, match="SIGINT after step 2") as caught:
        train(recipe)
    hangs.set()
    assert caught.value.exit_code == 130
    assert time.monotonic() - started < 30


def test_a_second_interrupt_in_a_save_leaves_the_checkpoints_sound(tiny_recipe, tmp_path, whole, monkeypatch):
    recipe = load_recipe(tiny_recipe(**CHANGES))
    with monkeypatch.context() as once:
        signal_at(once, checkpoint, "write_directory", 2, signal.SIGINT)
        signal_at(once, checkpoint, "save_file", 2, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # what a SIGINT is in this process, where the command has no say
            train(recipe)
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-000002"]
    train(recipe, Start(resume=True))
    same_files(whole, tmp_path / "run", checkpoints=False)
