"""Helpers for autocast, for tracing, and for torch.compile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off on the device. The meta device has no autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def needs_plain_operations() -> bool:
    """True under torch.compile, export, tracing, torch.func and forward-mode AD.

    They need operations that they can differentiate and fuse, not our autograd Functions and hooks.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class Stored(torch.autograd.Function):
    """The identity, but inductor writes its result to memory: as_strided needs a buffer.

    Otherwise inductor would compute the constants of a channel, with all their erf and exp, again
    for every element of the maps that use them.
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
    """t itself; under torch.compile, it is stored rather than computed again at each use."""
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return Stored.apply(t) if compiles else t


def inductor_options() -> dict[str, object]:
    """Options for torch.compile(model, options=…) that reduce a norm's backward to two passes.

    By default, inductor stores an intermediate that several reductions read, here the gradient of
    the norm's output, in float32. Computing it again in each reduction costs no memory traffic,
    because its inputs are read there anyway. Also by default, reductions of fewer than 8 values,
    such as those over the channels of a small group, are unrolled; each sum would then read the
    maps separately.
    """
    return {
        "realize_reads_threshold": 16,
        "realize_opcount_threshold": 200,
        "unroll_reductions_threshold": 1,
    }
