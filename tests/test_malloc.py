"""Whether freed memory stays with the process, seen in the page faults of asking for it again."""

import platform
import subprocess
import sys

import pytest

AGAIN = """
import resource, sys
import torch
from orpo_cli.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def use():
    torch.ones(16 * 2**20)  # 64 MiB
for _ in range(20):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
def test_a_buffer_asked_for_again_is_not_taken_from_the_kernel_again():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", AGAIN, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("give back") / 10
