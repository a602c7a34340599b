"""Autocast switched off, tracing recognized, and what a compiler is told about the layer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


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


class Stored(torch.autograd.Function):
    """The identity, which inductor writes to memory: as_strided needs a buffer to stride over.

    Else it would compute constants of a channel, with all of their erf and exp, again at every
    element of the maps that use them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor) -> Tensor:
        return t.as_strided(t.shape, t.stride())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def stored(t: Tensor) -> Tensor:
    """t, not to be inlined where torch.compile traces it."""
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return Stored.apply(t) if compiles else t


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
