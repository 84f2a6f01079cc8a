"""Memory beside the tensors, on a CPU: freed blocks are kept, kernels made for shapes that are gone are not."""

from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Older releases of glibc take no more than the second for a block.
_THRESHOLDS = (1 << 30, 1 << 25)


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to a GiB (32 MiB in older releases) rather than give them to the kernel.

    Handed out anew, memory from the kernel is zeroed page by page: for the buffers of a step on a CPU, some five
    percent of its time. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # The other one alone would have every block above 128 KiB given back, which glibc by itself learns not to do.
        if any(libc.mallopt(_M_MMAP_THRESHOLD, threshold) for threshold in _THRESHOLDS):
            libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLDS[0])


def keep_few_kernels() -> None:
    """Have torch's CPU kernels cached for the shapes of one micro-batch. Only before torch is imported has it effect.

    oneDNN makes a kernel for each shape of a product, and torch keeps a thousand of them. Micro-batches hardly ever
    have the same number of tokens, so theirs are never used again: over half a GiB within a few steps.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
