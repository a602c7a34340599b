"""Figures read a step later, updates left out by the device itself. Needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Readback:
    """Sends figures to the host now; `read` waits for them, which a step later takes no time."""

    def __init__(self, figures: Tensor) -> None:
        on_gpu = figures.device.type == "cuda"
        # A copy from the GPU runs beside the host only into page-locked memory.
        self.host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=on_gpu)
        self.host.copy_(figures, non_blocking=True)
        self.arrived = None
        if on_gpu:
            self.arrived = torch.cuda.Event(blocking=True)  # sleep, as loader threads need the core
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


def step_if(optimizer: torch.optim.Optimizer, good: Tensor) -> None:
    """Step where `good`, a bool () on the device, holds; else leave weights and state untouched.

    torch's fused optimizers and our RMSpropTF decide on the device. For timm's other ones the host
    waits for the device here.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # The interface of torch's GradScaler, with a scale of one.
        optimizer.grad_scale, optimizer.found_inf = None, (~good).float()
        optimizer.step()
    elif good:
        optimizer.step()


class Undo:
    """Keeps tensors as they are now, to put them back where a step turns out not to be finite."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.pairs = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def unless(self, good: Tensor) -> None:
        """Put the tensors back unless `good`, a bool () that stays on the device."""
        for tensor, kept in self.pairs:
            tensor.copy_(torch.where(good, tensor, kept))
