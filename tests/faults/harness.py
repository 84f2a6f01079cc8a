"""Whole runs as processes that can be killed at any moment, at a second each.

Importing torch, transformers and peft takes most of a start, so a server imports them once and forks a process for
each run, which does all that the command line does.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from orpo_cli.train.checkpoint import newest_sound
from tests.conftest import tiny_rows, write_tiny_base, write_tiny_recipe
from tests.runs import rows, same_files

# No run takes a tenth of this: what does hangs.
PATIENCE = 120.0
# Of a stream's shuffled order, so that 64 rows are several blocks.
BLOCK_ROWS = 16
_PRELOAD = ["orpo_cli.train.run", "bitsandbytes", "transformers.models.llama.modeling_llama", "tests.faults.harness"]

# What is done how often, for the summary at the end.
tally: Counter[str] = Counter()

KINDS: dict[str, dict[str, Any]] = {
    "file-lora": {
        "model": {"chat_template": "chatml"},  # adds tokens, whose rows are trained too
        "lora": {"dropout": 0.1},
        "train": {"sample_prompts": ["Which is larger?"]},
    },
    "file-full": {
        "lora": None,
        "data": {"eval": {"holdout": 7}},  # an epoch's edge lies within a step
        "train": {"optimizer": "adamw_8bit", "learning_rate": 1e-3},
    },
    "stream-lora": {
        "model": {"dtype": "float16"},  # with loss scaling
        "data": {"streaming": True, "eval": {"holdout": 7}},
        "loss": {"nll_tokens": "all", "nll_reduction": "token"},
    },
    "stream-full": {
        "model": {"dtype": "bfloat16"},  # with float32 masters
        "lora": None,
        "data": {"streaming": True},
        "train": {"learning_rate": 1e-3},
    },
}


@dataclass(frozen=True)
class Fault:
    """What is to befall a process: its `call`-th change of a file under `directory` (from 1) kills it, or the disk is
    full from then on. With `call` 0 nothing happens; the changes are recorded all the same.
    """

    directory: Path
    record: Path
    """Where each change is written before it is made, one a line."""
    call: int = 0
    full: bool = False
    mechanism: str = "python"
    """`python`: functions of `os`; `libc`: everything, also what safetensors writes from Rust, see shim.c."""


class Runs:
    """Starts runs of the tiny base, each kind with its uninterrupted reference."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base, self.pairs = directory / "base", directory / "pairs.jsonl"
        write_tiny_base(self.base)
        self.pairs.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(64)), encoding="utf-8")
        self.why_no_shim = _start_server(directory)
        self._context = multiprocessing.get_context("forkserver")
        self._references: dict[str, Reference] = {}
        self._numbers = itertools.count()

    def recipe(self, kind: str, run: Path) -> Path:
        """Write the recipe of a kind, for a run in `run`: 3 epochs of 21 or 22 steps, a save every second step."""
        changes = {
            "lora": {},
            **KINDS[kind],
            "train": {"max_steps": None, "num_train_epochs": 3, "eval_steps": 7, **KINDS[kind].get("train", {})},
        }
        path = self.directory / f"recipe-{next(self._numbers)}.yaml"
        return write_tiny_recipe(path, self.base, self.pairs, run, **changes)

    def reference(self, kind: str) -> Reference:
        """The run of this kind that nothing disturbed; made when it is first asked for."""
        if kind not in self._references:
            run = self.directory / kind
            recipe = self.recipe(kind, run)
            if not self._references:  # the first process waits for the server's imports and the disk
                self.finish(recipe)
            started = time.monotonic()
            self.finish(recipe, "--overwrite")
            self._references[kind] = Reference(run, time.monotonic() - started)
        return self._references[kind]

    def last_steps(self, kind: str) -> Path:
        """A run killed once it had saved step 20: a step or two, the last save and all that follows are left."""
        run = self.directory / f"{kind}-killed"
        checkpoints = run / "checkpoints"
        recipe = self.recipe(kind, run)
        while not run.exists() or newest_sound(checkpoints)[0] != checkpoints / "step-000020":
            started = self.start(recipe, "--overwrite")
            while started.process.is_alive() and not (checkpoints / "step-000020").exists():
                time.sleep(0.001)
            started.kill()
        return run

    def start(self, recipe: Path, *options: str, fault: Fault | None = None) -> Started:
        """Start `orpo train` in a process of its own."""
        log = self.directory / f"log-{next(self._numbers)}"
        process = self._context.Process(target=_orpo, args=(["train", str(recipe), *options], log, fault))
        process.start()
        return Started(process, log)

    def finish(self, recipe: Path, *options: str) -> None:
        """Run to the end; it must succeed."""
        started = self.start(recipe, *options)
        assert started.wait() == 0, started.output()


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed."""

    run: Path
    seconds: float

    def equals(self, run: Path, *, checkpoints: bool = True) -> None:
        """Nothing tells the other run from this one but times; every step is there once; nothing is left over.

        Without `checkpoints`, of those only the newest is looked at.
        """
        steps = [row["step"] for row in rows(run) if "loss" in row]
        assert steps == list(range(1, len(steps) + 1))
        same_files(self.run, run, checkpoints=checkpoints)


@dataclass(frozen=True)
class Started:
    """A run under way."""

    process: BaseProcess
    log: Path

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code, minus the signal's number if one killed it. A run that hangs fails the test."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"the run hangs:\n{self.output()}")
        return self.process.exitcode

    def output(self) -> str:
        """What it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def kill(self) -> bool:
        """SIGKILL; whether it was still there to be killed and had not ended well before."""
        self.process.kill()
        code = self.wait()
        assert code in (0, -signal.SIGKILL), self.output()
        return code != 0


def _orpo(arguments: list[str], log: Path, fault: Fault | None) -> None:
    """The process of a run: `orpo` with these arguments, its output in `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from orpo_cli.__main__ import main
    from orpo_cli.data import dataset

    if "streaming: true" in Path(arguments[1]).read_text():
        dataset.BLOCK_ROWS = BLOCK_ROWS
    sys.argv = ["orpo", *arguments]
    if fault is not None:
        (_arm_libc if fault.mechanism == "libc" else _arm_python)(fault)
    main()


# ---- faults within a process ----

# What of `os` changes files; writes themselves pass by Python.
_CHANGES = ("fsync", "mkdir", "rename", "replace", "rmdir", "truncate", "unlink")


def _arm_python(fault: Fault) -> None:
    """Replace functions of `os` by ones that count, and at one call are the end of the process."""
    record = os.open(fault.record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    calls = itertools.count(1)

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            os.write(record, f"{name} {args[-1]}\n".encode())
            number = next(calls)
            if fault.full and number >= fault.call and name not in ("rmdir", "unlink"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number == fault.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in _CHANGES:
        setattr(os, name, counted(name, getattr(os, name)))


def _arm_libc(fault: Fault) -> None:
    record, directory = os.fsencode(fault.record), os.fsencode(fault.directory)
    ctypes.CDLL(None).fault_arm(directory, fault.call, int(fault.full), record)


def _start_server(directory: Path) -> str | None:
    """Start the server that forks runs, with the shim in it if there can be one; else why there can be none."""
    library = directory / "shim.so"
    compiler = shutil.which("cc")
    command = [str(compiler), "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("shim.c")), "-ldl"]
    why = None
    if not sys.platform.startswith("linux"):
        why = "the shim is for Linux"
    elif compiler is None:
        why = "there is no C compiler to build the shim with"
    elif (built := subprocess.run(command, capture_output=True, text=True)).returncode:
        why = f"the shim cannot be built: {built.stderr}"
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        if why is None:
            patch.setenv("LD_PRELOAD", str(library))
        forkserver.ensure_running()
    return why


# ---- looking on ----


def wait_for_save(run: Path, started: Started, number: int) -> bool:
    """Until a checkpoint is being written for the `number`-th time from now on; whether it came to that."""
    seen: set[str] = set()
    while started.process.is_alive():
        checkpoints = run / "checkpoints"
        seen |= {path.name for path in checkpoints.glob(".*.unfinished")}
        if len(seen) >= number:
            return True
        time.sleep(0.0005)
    return False


def is_sound(run: Path) -> None:
    """No checkpoint newer than the one that a resumption would take is damaged."""
    assert newest_sound(run / "checkpoints")[1] == []
