"""What a device has: the machine's memory, or less where something limits it."""

from __future__ import annotations

from pathlib import Path

import torch

from orpo_cli.model import device
from orpo_cli.model.device import GIB, device_memory

CPU = torch.device("cpu")


def test_the_device_has_what_the_machine_or_a_limit_says(monkeypatch, tmp_path):
    limits = [*device.memory_limits()]
    assert device_memory(CPU) == int(0.8 * min(limits)) - GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_memory(CPU) == int(0.4 * min(limits)) - GIB
    # A limit above this process's group counts too; "max" is none.
    (tmp_path / "run/job").mkdir(parents=True)
    (tmp_path / "run/memory.max").write_text("123456789\n")
    (tmp_path / "run/job/memory.max").write_text("max\n")
    (tmp_path / "cgroup").write_text("0::/run/job\n")
    paths = {"/proc/self/cgroup": tmp_path / "cgroup", "/sys/fs/cgroup": tmp_path}
    monkeypatch.setattr(device, "Path", lambda path, *more: Path(paths[path], *more))
    assert [*device.memory_limits()] == [limits[0], 123456789]
