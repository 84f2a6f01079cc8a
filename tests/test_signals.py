"""Real signals to real processes, at moments that are no part of the loop: the exit code and one line, no more."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_cli.recipe import load_recipe
from orpo_cli.train.run import Start, train
from tests.runs import same_files

# Runs the command with a signal to itself in the first call of a function; `import NAME` is the moment of an import.
DRIVER = """
import importlib, os, sys
from orpo_cli.__main__ import main

place, name, number, *sys.argv[1:] = sys.argv[1:]
number = int(number)
if place == "import":
    class Finder:
        def find_spec(self, module, path, target=None):
            if module == name:
                os.kill(os.getpid(), number)
    sys.meta_path.insert(0, Finder())
else:
    owner = importlib.import_module(place)
    function = getattr(owner, name)
    def interrupted(*arguments, **keywords):
        os.kill(os.getpid(), number)
        return function(*arguments, **keywords)
    setattr(owner, name, interrupted)
main()
"""


def interrupted(place: str, name: str, number: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DRIVER, place, name, str(int(number)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("place", "name", "number", "code"),
    [
        ("import", "typer", signal.SIGINT, 130),
        ("import", "torch", signal.SIGTERM, 143),
        ("orpo_cli.data.dataset", "survey", signal.SIGHUP, 143),
        ("orpo_cli.train.run", "plan_memory", signal.SIGTERM, 143),
    ],
)
def test_before_the_loop_there_is_nothing_to_save(tiny_recipe, tmp_path, place, name, number, code):
    done = interrupted(place, name, number, "train", tiny_recipe())
    assert done.returncode == code, done.stderr
    assert last_line(done) == f"stopped by {signal.Signals(number).name}; nothing had to be saved"
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("orpo_cli.train.finish", "fill_adapter"),
        ("orpo_cli.merge", "merge_into_base"),
    ],
)
def test_after_the_loop_all_steps_are_saved_and_a_resume_does_the_rest(tiny_recipe, tiny_run, tmp_path, place, name):
    recipe = tiny_recipe()
    done = interrupted(place, name, signal.SIGTERM, "train", recipe)
    assert done.returncode == 143, done.stderr
    assert last_line(done).startswith("stopped by SIGTERM; --resume goes on from the newest checkpoint")
    train(load_recipe(recipe), Start(resume=True))
    same_files(tiny_run, tmp_path / "run")


def test_evaluations_and_merges_end_at_once_and_leave_nothing(tiny_run, tmp_path):
    output = tmp_path / "eval.json"
    done = interrupted("orpo_cli.scores", "_score", signal.SIGTERM, "eval", tiny_run, "--output", output)
    assert (done.returncode, last_line(done)) == (143, "stopped by SIGTERM; nothing had to be saved")
    done = interrupted("orpo_cli.merge", "save_model", signal.SIGINT, "merge", tiny_run, "--output", tmp_path / "full")
    assert (done.returncode, last_line(done)) == (130, "stopped by SIGINT; nothing had to be saved")
    assert not list(tmp_path.iterdir())


def test_what_swallows_the_exception_is_left_all_the_same():
    source = (
        "import os, signal, time\nfrom orpo_cli import signals\nsignals._PATIENCE = 0.2\nsignals.leave_at_once()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    pass\ntime.sleep(60)\n"
    )
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", source], capture_output=True).returncode == 143
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number):
    """As under nohup, and in a script's background."""
    source = (
        f"import os, signal\nsignal.signal({int(number)}, signal.SIG_IGN)\nfrom orpo_cli import signals\n"
        f"signals.leave_at_once()\nwith signals.noted() as stop:\n    os.kill(os.getpid(), {int(number)})\n"
        "print(stop.number)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n")


def test_a_signal_that_nobody_looked_at_in_time_is_not_lost():
    source = (
        "import os, signal\nfrom orpo_cli import signals\nsignals.leave_at_once()\n"
        "with signals.noted():\n    os.kill(os.getpid(), signal.SIGTERM)\nprint('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "")


def test_nothing_changes_the_code_of_a_program_that_is_done():
    source = (
        "import atexit, os, signal, sys\nfrom orpo_cli import signals\n"
        "signals.leave_at_once()\nsignals.settled()\nsys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", source]).returncode == 3


LONG = {"max_steps": 4000, "save_steps": 100_000, "learning_rate": 1e-4, "eval_on_start": False}


def test_a_terminal_that_hangs_up_is_no_loss(tiny_recipe, tmp_path):
    """Its end is a SIGHUP, and an error for whatever is still said."""
    recipe = tiny_recipe(train=LONG)
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "orpo_cli", "train", str(recipe)])
    metrics = tmp_path / "run/metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 143
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


def test_a_reader_that_goes_is_no_loss(tiny_recipe, tmp_path):
    """`orpo train recipe.yaml 2>&1 | tee log`, and Ctrl-C: tee is gone before the run is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orpo_cli", "train", str(tiny_recipe(train=LONG))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.stdout.close()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1
