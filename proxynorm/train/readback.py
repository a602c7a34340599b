"""Training without waiting for the GPU: delayed reads, and updates that the GPU itself skips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Readback:
    """A copy of a tensor to the host, started now; `read` waits until it has arrived.

    One training step later it has arrived already, and `read` takes no time.
    """

    def __init__(self, values: Tensor) -> None:
        on_gpu = values.device.type == "cuda"
        # A copy from the GPU is asynchronous only into page-locked memory.
        self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        self.host.copy_(values, non_blocking=True)
        self.arrived = None
        if on_gpu:
            # Blocking: the host sleeps while it waits, and leaves the core to loader threads.
            self.arrived = torch.cuda.Event(blocking=True)
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.tolist()


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Step if `finite`, else leave weights and optimizer state as they are.

    finite: bool (), on the device. torch's fused optimizers and our RMSpropTF decide on the device;
    with any other optimizer the host waits for the value.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # As torch's GradScaler does it, without a scale.
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()


class Snapshot:
    """Copies of tensors, to restore them after a step that was not finite."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.pairs = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore_unless(self, finite: Tensor) -> None:
        """Restore the tensors unless `finite`, bool (), which stays on the device."""
        for tensor, kept in self.pairs:
            tensor.copy_(torch.where(finite, tensor, kept))
