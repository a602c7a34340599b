"""Where autocast must not choose the precision."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switches autocast off for operations on the device; the meta device, which computes shapes alone, has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
