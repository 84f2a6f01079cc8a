"""What memory a device has, and what the process has taken of it."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

GIB = 2**30
# Bytes that a process on a CPU takes beside all that memory.py counts, from its first step on. Chosen by the runs of
# benchmarks/planned_memory.py: most of them take somewhat less, a full fine-tune of a large vocabulary takes more.
_FIRST_STEPS = 3 * GIB // 16


def process_memory(device: torch.device) -> int:
    """Bytes that the process takes for Python, libraries and data, told before a model is there; 0 but on a CPU.

    What it holds now, and what its first steps bring in: more of the libraries' code, kernels made for the shapes at
    hand, room lost between blocks.
    """
    if device.type != "cpu":
        return 0
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") + _FIRST_STEPS
    except OSError:  # not Linux: the most that it has held so far
        return peak_memory(device) + _FIRST_STEPS


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def device_memory(device: torch.device) -> int:
    """Bytes that a run may plan with: what the device has in all, less a reserve for what is not counted here.

    On a CPU that is the machine's memory, or less where a limit is set on this process, shared among the run's
    processes on the machine.
    """
    if device.type == "cpu":  # the reserve: Python and libraries, the data, whatever else runs
        return int(0.8 * min(memory_limits()) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) - GIB
    if device.type == "mps":
        return int(0.9 * torch.mps.recommended_max_memory())
    # The reserve: the driver's context, and what the allocator loses between blocks.
    return int(0.95 * torch.accelerator.get_memory_info(device)[1]) - GIB


def memory_limits() -> Iterator[int]:
    """The machine's memory, and each limit that a control group (Linux) sets to this process."""
    yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):  # version 2, version 1
            continue
        root = Path("/sys/fs/cgroup", controllers)
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            file = directory / ("memory.limit_in_bytes" if controllers else "memory.max")
            if directory.is_relative_to(root) and file.is_file() and (limit := file.read_text().strip()).isdigit():
                yield int(limit)
