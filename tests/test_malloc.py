"""Whether freed memory stays with the process, and kernels of shapes that are gone do not."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from orpo_cli.malloc import keep_freed_memory

AGAIN = """
import resource, sys, threading
import torch
from orpo_cli.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def use():
    torch.ones(12 * 2**20)  # 48 MiB
for _ in range(20):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    if "thread" in sys.argv:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    else:
        use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
@pytest.mark.parametrize("where", ["here", "thread"])
def test_a_buffer_asked_for_again_is_not_taken_from_the_kernel_again(where):
    """Nor in a thread, where it would not have been this one's."""

    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", AGAIN, how, where], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("give back") / 10


def test_a_c_library_that_takes_a_lower_threshold_gets_it(monkeypatch):
    """As glibc before 2.35: a refused threshold must not leave the other one set alone."""

    class Older:
        def __init__(self, most: int) -> None:
            self.most, self.taken = most, {}

        def mallopt(self, what: int, value: int) -> int:
            if what == -3 and value > self.most:
                return 0
            self.taken[what] = value
            return 1

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    kept = {-1: 2**30, -8: 1}
    for most, taken in ((2**26, {-3: 2**26, **kept}), (2**25, {-3: 2**25, **kept}), (2**20, {})):
        libc = Older(most)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, libc=libc: libc)
        keep_freed_memory()
        assert libc.taken == taken


SHAPES_AGAIN = """
import sys
if sys.argv[1] == "few":
    from orpo_cli.malloc import keep_few_kernels
    keep_few_kernels()
import torch
weight = torch.randn(64, 96, dtype=torch.bfloat16)
for round in (1, 2):
    print(f"round {round}", flush=True)
    for tokens in range(100, 400):
        torch.zeros(tokens, 64, dtype=torch.bfloat16) @ weight
"""


def test_kernels_of_shapes_that_are_gone_are_given_up():
    """oneDNN tells of each kernel that it makes: those of the second round are made anew where few are kept."""
    environment = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k} | {"ONEDNN_VERBOSE": "2"}
    made_again = {}
    for keep in ("all", "few"):
        told = subprocess.check_output([sys.executable, "-c", SHAPES_AGAIN, keep], env=environment, text=True)
        first, second = told.split("round 2")
        if "create:cache_miss" not in first:
            pytest.skip("on this processor torch multiplies bfloat16 without oneDNN")
        made_again[keep] = second.count("create:cache_miss")
    assert made_again["all"] == 0
    assert made_again["few"] >= 300
