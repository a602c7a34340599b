"""Callers that do not know NormAct2d: tools that skip it, and models that add an activation.

update_bn replaces one of these tools.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# what to do instead, by module and function
_TOOLS = {
    ("torch.optim.swa_utils", "update_bn"): "call proxynorm.update_bn(model, loader)",
    ("torch.nn.modules.batchnorm", "convert_sync_batchnorm"): (
        'set norm_batch="global" in proxynorm.convert or create_model'
    ),
    ("timm.layers.norm_act", "freeze_batch_norm_2d"): (
        "call eval() on these layers after each model.train(), to keep their statistics"
    ),
}


def warn_if_skipped() -> None:
    """Warn if the caller is one of the tools, which look for torch's batch norms in a network.

    They walk through the network by named_children or modules; NormAct2d's versions call this.
    """
    frame = sys._getframe(2)  # the caller of NormAct2d's method
    # named_modules calls itself and modules() calls it, all in this file of torch.
    while frame.f_back is not None and frame.f_code.co_filename == nn.modules.module.__file__:
        frame = frame.f_back
    tool = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    if tool in _TOOLS:
        warnings.warn(
            f"{tool[1]} handles PyTorch's own batch norms only and leaves NormAct2d as it is: "
            f"{_TOOLS[tool]}",
            stacklevel=2,
        )


def refuse_plain_norm(caller: str) -> None:
    """Raise ValueError for a model of timm or torchvision whose norm_layer= is a norm alone.

    Constructors that expect a norm+act layer pass act_layer. One that leaves it out adds its own
    activation, so the network would have two in a row, without any error.
    """
    if caller.startswith(("timm.", "torchvision.")):
        raise ValueError(
            f"{caller} has an activation of its own behind norm_layer=, and NormAct2d would add "
            "another: build the model with batch norm, then call proxynorm.convert"
        )


@torch.no_grad()
def update_bn(
    model: nn.Module,
    loader: Iterable[Tensor | list[Tensor] | tuple[Tensor, ...]],
    device: torch.device | str | None = None,
) -> None:
    """Set the running statistics of all batch norms to their averages over a loader's batches.

    Use it for averaged weights (SWA, EMA) instead of torch.optim.swa_utils.update_bn, which only
    knows torch's own batch norms. The modes and momenta of the model's modules are restored.

    Args:
        model: a model; its batch norms may be NormAct2d's or torch's.
        loader: yields batches of images, or lists or tuples whose first element is such a batch.
        device: the device to move the images to; None leaves them where they are.
    """
    modules: list[Any] = list(model.modules())
    norms = [m for m in modules if getattr(m, "num_batches_tracked", None) is not None]
    if not norms:
        return
    modes, momenta = [m.training for m in modules], [norm.momentum for norm in norms]
    for norm in norms:
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.num_batches_tracked.zero_()
        norm.momentum = None  # a cumulative average
    try:
        model.train()
        for batch in loader:
            images = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(images if device is None else images.to(device))
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, mode in zip(modules, modes):
            module.training = mode
