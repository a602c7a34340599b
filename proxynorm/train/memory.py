"""How malloc treats memory between two steps."""

from __future__ import annotations

import ctypes
import os

import torch

# mallopt(3): give no memory back, and map no block by itself.
M_TRIM_THRESHOLD, NEVER = -1, -1
M_MMAP_MAX, NONE = -4, 0


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc's malloc keep freed memory for the next step on the CPU; return whether it does.

    By default malloc returns most feature maps to the system after each step and requests them
    again, page by page. Does nothing with CUDA, another C library, or malloc settings in the
    environment.
    """
    settings = ("GLIBC_TUNABLES", "MALLOC_")
    if device.type != "cpu" or any(name.startswith(settings) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(*setting) for setting in ((M_TRIM_THRESHOLD, NEVER), (M_MMAP_MAX, NONE))
    )
