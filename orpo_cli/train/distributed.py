"""Devices and processes: a thin face on accelerate.

Every process works on its share of a step's pairs; gradients and metrics are summed over processes. Since the loss is
normalised by the whole step (loss.py), the sum is the gradient, whatever the number of processes.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from orpo_cli.errors import RunError, is_out_of_memory
from orpo_cli.model.device import GIB, peak_memory

T = TypeVar("T")

# Numbers that travel in one message; a copy of them is held while it does.
BUCKET_NUMBERS = 2**26
# How long one process may wait for another, which may be writing a large checkpoint to a slow disk.
PATIENCE = timedelta(hours=3)


class Processes:
    """This process, its device, and how it speaks to the others; alone, it does nothing."""

    def __init__(self) -> None:
        wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        # accelerate joins a group of processes on CPUs (gloo) only if it is told that there is nothing else.
        state = PartialState(cpu=wants_cpu or not torch.accelerator.is_available(), timeout=PATIENCE)
        self.device: torch.device = state.device
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self.is_main: bool = state.is_main_process

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that is the same in all."""
        return self.shares(items)[self.rank]

    def shares(self, items: Sequence[T]) -> list[list[T]]:
        """All processes' parts of it, by rank."""
        return [list(items[rank :: self.count]) for rank in range(self.count)]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors over all processes, in place: small ones by the bucket, so that messages are few."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and (tensor.dtype != bucket[0].dtype or _numel(bucket) + tensor.numel() > BUCKET_NUMBERS):
                _all_reduce(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            _all_reduce(bucket)

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers, so that all decide alike (0 where no signal came, say)."""
        if self.count == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        with _explained():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def cost(self, started: float, tokens: float) -> dict[str, float]:
        """What differs between two equal runs: seconds since `started`, speed, the most memory used so far (GiB)."""
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": peak_memory(self.device) / GIB,
        }

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            with _explained():
                dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.count > 1:
            dist.destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    """Say in our own words that the other processes are not there any more."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RunError("another process of this run has ended", "what it said before, above, tells why") from error


def _numel(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _all_reduce(bucket: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    with _explained():
        dist.all_reduce(flat)
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))


def make_deterministic(device: torch.device) -> None:
    """On a CPU, the same recipe gives the same bytes; on a GPU some kernels add in an order of their own."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A debugging aid that comes along and costs a seventh of the time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(*key: int) -> None:
    """Set every random state from the integers of `key`.

    Called with (seed, step, rank) before each step: what dropout draws is then a function of the step alone, and a
    resumed run needs no random states from its checkpoint.
    """
    seed = int(np.random.SeedSequence([k % 2**32 for k in key]).generate_state(1, np.uint64)[0] >> 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Whatever draws or seeds within it, every random state is afterwards as it was before."""
    python, numpy = random.getstate(), np.random.get_state()
    on_device = device.type != "cpu"
    with torch.random.fork_rng([device] if on_device else [], device_type=device.type if on_device else "cuda"):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
