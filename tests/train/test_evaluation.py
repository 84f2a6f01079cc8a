"""Evaluations within a run, shared by two processes: of which one is told to stop, or runs out of memory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_cli.recipe import load_recipe
from orpo_cli.train.checkpoint import checkpoints
from orpo_cli.train.run import Start, train
from tests.runs import rows

# Of the two processes the second alone has a signal in the fourth micro-batch that it scores, counted over all
# evaluations, or no memory for more tokens than the number, with gradients or without.
DRIVER = """
import os, sys
from orpo_cli.__main__ import main
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.train import evaluation, run

what, number, codes, *sys.argv[1:] = sys.argv[1:]
number, rank, scored = int(number), os.environ["RANK"], []
forward, score_in_parts = PairLogprobs.forward, evaluation.score_in_parts

def without_memory(self, batch):
    if batch.tokens > number and batch.pairs[0].chosen_start > 1:  # memory is estimated on another pair
        raise MemoryError
    return forward(self, batch)

def with_a_signal(*arguments, **keywords):
    for tokens in score_in_parts(*arguments, **keywords):
        scored.append(tokens)
        if len(scored) == 4:
            os.kill(os.getpid(), number)
        yield tokens

run.rehearse = lambda run: None  # memory and signals are to meet the evaluation
if rank == "1" and what == "memory":
    PairLogprobs.forward = without_memory
if rank == "1" and what == "signal":
    evaluation.score_in_parts = with_a_signal
try:
    main()
except SystemExit as left:
    with open(os.path.join(codes, rank), "w") as file:
        file.write(f"{left.code} {len(scored)}")
    raise
"""


def in_two_processes(tmp_path: Path, what: str, number: int, recipe: Path) -> tuple[str, list[str]]:
    """What was said, and the exit codes and numbers of micro-batches that were scored, by rank.

    Once a process has failed, torchrun sends SIGTERM to the others, which may come before they have told theirs.
    """
    (tmp_path / "driver.py").write_text(DRIVER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, tmp_path / "driver.py", what, str(number), tmp_path, "train", recipe],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(Path.cwd())},
    )
    return done.stderr, [path.read_text() for path in sorted(tmp_path.glob("[01]"))]


def almost_the_same(one: Path, other: Path) -> None:
    """Two processes add up in another order than one."""
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert theirs[key] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value), key


TRAIN = {"max_steps": 4, "eval_steps": 2, "eval_on_start": True, "save_steps": 100}


def test_a_signal_to_one_process_ends_the_evaluation_of_both(tiny_recipe, tmp_path):
    changes = {"train": {**TRAIN, "max_tokens_per_microbatch": 1}, "data": {"eval": {"holdout": 5}}}
    recipe = tiny_recipe(**changes)
    told, codes = in_two_processes(tmp_path, "signal", signal.SIGTERM, recipe)
    # Of five pairs the second process has two: two before training, and the fourth after step 2.
    assert codes, told
    assert set(codes) <= {"143 0", "143 4"}, told
    assert "stopped by SIGTERM after step 2; all is saved" in told
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-000002"]
    train(load_recipe(recipe), Start(resume=True))
    train(load_recipe(tiny_recipe(**changes, output={"dir": str(tmp_path / "whole")})))
    almost_the_same(tmp_path / "whole", tmp_path / "run")


def test_one_process_without_memory_makes_both_compute_in_smaller_parts(tiny_recipe, tmp_path):
    told, codes = in_two_processes(tmp_path, "memory", 150, tiny_recipe(train=TRAIN))
    assert codes == ["0 0", "0 0"], told
    # It first shows in the evaluation, whose budget the steps then have: nothing is tried in vain.
    assert told.count("out of memory") == 1
    assert "out of memory in an evaluation" in told
    state = json.loads((tmp_path / "run/checkpoints/step-000004/state.json").read_text())
    assert 75 <= state["max_tokens"] <= 150
    train(load_recipe(tiny_recipe(train=TRAIN, output={"dir": str(tmp_path / "whole")})))
    almost_the_same(tmp_path / "whole", tmp_path / "run")


def test_both_processes_end_where_one_has_no_memory_for_a_pair(tiny_recipe, tmp_path):
    told, codes = in_two_processes(tmp_path, "memory", 0, tiny_recipe(data={"eval": None}, train={"max_steps": 2}))
    assert set(codes) == {"1 0"}
    assert told.count("error: out of memory with") == 2
    assert "Traceback" not in told.split("torch/distributed")[0]
