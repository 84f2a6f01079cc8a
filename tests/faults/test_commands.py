"""The same through the command line itself, and with two processes under torchrun."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.harness import Runs, is_sound, tally
from tests.runs import same_files

ORPO = [sys.executable, "-m", "orpo_cli"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *ORPO[1:]]
PATIENCE = 180.0


class Command:
    """A command under way, its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def wait_for(self, words: str) -> None:
        """Until it has printed these words."""
        ends = time.monotonic() + PATIENCE
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < ends, self.log.read_text()
            time.sleep(0.002)

    def kill_all(self) -> None:
        """SIGKILL to it and all processes that it has started, as when a machine goes."""
        for process in (*self.children(), self.process.pid):
            os.kill(process, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def children(self) -> list[int]:
        """The processes that it has started, in that order."""
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return sorted(int(word) for word in listed.stdout.split())

    def finish(self) -> None:
        """To the end; it must succeed."""
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()


@pytest.fixture
def command(tmp_path):
    started: list[Command] = []

    def start(*words: str | Path) -> Command:
        started.append(Command([str(word) for word in words], tmp_path / f"log-{len(started)}"))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill_all()


@pytest.mark.faults
def test_the_command_line_killed_and_stopped(runs: Runs, command, tmp_path):
    reference, generator = runs.reference("file-lora"), random.Random(0)
    train = [*ORPO, "train", runs.recipe("file-lora", tmp_path / "run"), "--resume"]
    for step in (3, 8, 13):
        killed = command(*train)
        killed.wait_for(f"step {step}/")
        time.sleep(generator.uniform(0, 0.1))
        killed.kill_all()
        is_sound(tmp_path / "run")
        tally["SIGKILLs of the command line"] += 1
    stopped = command(*train)
    stopped.wait_for("step 17/")
    stopped.process.terminate()
    assert stopped.process.wait(PATIENCE) == 143
    tally["SIGTERMs of the command line, clean exits with 143"] += 1
    command(*train).finish()
    reference.equals(tmp_path / "run")


@pytest.mark.faults
def test_two_processes_of_which_one_or_all_are_killed(runs: Runs, command, tmp_path):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    command(*TWO_PROCESSES, "train", runs.recipe("stream-lora", undisturbed)).finish()
    train = [*TWO_PROCESSES, "train", runs.recipe("stream-lora", disturbed), "--resume"]
    for rank, step in ((0, 5), (1, 11), (None, 17)):
        started = command(*train)
        started.wait_for(f"step {step}/")
        if rank is None:
            started.kill_all()
        else:
            os.kill(started.children()[rank], signal.SIGKILL)
            assert started.process.wait(PATIENCE) != 0
        is_sound(disturbed)
        tally["SIGKILLs of one of two processes, or of both"] += 1
    command(*train).finish()
    same_files(undisturbed, disturbed)
