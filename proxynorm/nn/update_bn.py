"""Recompute batch norm's running statistics, for averaged weights (SWA, EMA)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from proxynorm.nn.norm_act import NormAct2d


@torch.no_grad()
def update_bn(
    model: nn.Module,
    loader: Iterable[Tensor | list[Tensor] | tuple[Tensor, ...]],
    device: torch.device | str | None = None,
) -> None:
    """Set the running statistics of all batch norms to their averages over a loader's batches.

    The equivalent of torch.optim.swa_utils.update_bn, which knows torch's own batch norms only and
    passes over NormAct2d without a word. The model's modes and momenta are restored.

    Args:
        model: a model with batch norms, NormAct2d's or torch's; others are left alone.
        loader: gives batches of images, or lists and tuples that begin with them.
        device: where to move the images; None leaves them where they are.
    """
    norms: list[Any] = [m for m in model.modules() if _is_tracked_batch_norm(m)]
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
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
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _is_tracked_batch_norm(module: nn.Module) -> bool:
    is_ours = isinstance(module, NormAct2d) and module.spec.batch_statistics
    is_batch_norm = is_ours or isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_batch_norm and module.running_mean is not None
