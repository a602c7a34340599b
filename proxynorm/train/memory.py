"""The process's memory between two steps."""

from __future__ import annotations

import ctypes
import os

import torch

# From glibc's malloc.h, and the values that its mallopt(3) gives: no memory is given back, no block is mapped by itself.
M_TRIM_THRESHOLD, NEVER = -1, -1
M_MMAP_MAX, NONE = -4, 0
OWN_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory(device: torch.device) -> bool:
    """Have glibc's malloc keep freed memory for the next step where the CPU computes; return whether it does.

    By default it gives most feature maps back to the system after each step and gets them anew, page by page, which takes
    time in every step (results/step/*_malloc.json beside *_channels_last.json). Malloc settings in the environment are
    left as they are; other C libraries and CUDA have no use for it.
    """
    if (
        device.type != "cpu"
        or os.name != "posix"
        or any(name in os.environ for name in OWN_SETTINGS)
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER)) and bool(mallopt(M_MMAP_MAX, NONE))
