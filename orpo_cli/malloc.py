"""Memory beside the tensors, on a CPU: freed blocks are kept, kernels made for shapes that are gone are not."""

from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Blocks of up to so many bytes are kept: older releases of glibc take no more than the second. A step's activations are
# smaller. What is larger, the gradient of a vocabulary say, would leave holes that nothing else fits into.
_KEPT_BLOCKS = (1 << 26, 1 << 25)
# And so many of them in a row, before any are given back.
_KEPT_IN_ALL = 1 << 30


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 64 MiB (32 in older releases) rather than give them to the kernel.

    Handed out anew, memory from the kernel is zeroed page by page: for the buffers of a step on a CPU, some five
    percent of its time. Threads share what is kept: each would keep as much by itself. Other C libraries are left as
    they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # The other one alone would have every block above 128 KiB given back, which glibc by itself learns not to do.
        if any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in _KEPT_BLOCKS):
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_IN_ALL)
            libc.mallopt(_M_ARENA_MAX, 1)


def keep_few_kernels() -> None:
    """Have torch's CPU kernels cached for the shapes of one micro-batch. Only before torch is imported has it effect.

    oneDNN makes a kernel for each shape of a product, and torch keeps a thousand of them. Micro-batches hardly ever
    have the same number of tokens, so theirs are never used again: over half a GiB within a few steps.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
