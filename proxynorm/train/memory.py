"""The process's memory between two steps."""

from __future__ import annotations

import ctypes
import os

import torch

# Parameters and values of mallopt(3): give no memory back, map no block by itself.
M_TRIM_THRESHOLD, NEVER = -1, -1
M_MMAP_MAX, NONE = -4, 0


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc's malloc keep freed memory for the next step on the CPU; return whether it does.

    By default it returns most feature maps to the system after each step and gets them anew, page
    by page (results/step/*_malloc.json beside *_channels_last.json). Malloc settings in the
    environment have priority; other C libraries and CUDA are left alone.
    """
    settings = ("GLIBC_TUNABLES", "MALLOC_")
    if device.type != "cpu" or any(name.startswith(settings) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(*setting) for setting in ((M_TRIM_THRESHOLD, NEVER), (M_MMAP_MAX, NONE))
    )
