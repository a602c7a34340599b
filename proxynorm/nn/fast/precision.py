"""Where autocast must not choose the precision, and where operations are being traced."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off on the device; the meta device has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def is_transformed() -> bool:
    """Tell whether torch.compile, export, tracing, torch.func or forward-mode AD is at work."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def inductor_options() -> dict[str, object]:
    """Options for torch.compile(model, options=…) with which a norm's backward is two passes.

    By default inductor stores an intermediate that several reductions read, here the gradient of
    the norm's output, in float32. Computing it again in each costs no memory traffic: its inputs
    are read there anyway. Reductions of fewer than 8 values, as those over the channels of a small
    group, are written out by default, and then each of their sums reads the maps by itself.
    """
    return {
        "realize_reads_threshold": 16,
        "realize_opcount_threshold": 200,
        "unroll_reductions_threshold": 1,
    }
