"""Reports of a non-finite loss or gradient: the layers where it began."""

from __future__ import annotations

import torch
from torch import nn

from proxynorm.errors import ProxynormError
from proxynorm.nn import NormAct2d
from proxynorm.train.evaluate import autocast

SHOWN = 5


class NonFiniteError(ProxynormError):
    """Training stopped before a non-finite update changed the weights; every process raises it."""

    status = 1


def affected(model: nn.Module, micro_batches: list[torch.Tensor], dtype: torch.dtype) -> list[str]:
    """Return the first layers whose output is not finite, in forward order, or "the input images".

    micro_batches: this process's images, (N, C, H, W). A norm and its activation are one layer.
    """
    found: dict[str, None] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            # A module that returns its input, such as Identity, is not where the fault began.
            unchanged = output is inputs[0] and not getattr(module, "inplace", False)
            checked = isinstance(output, torch.Tensor) and not unchanged
            if checked and not torch.isfinite(output).all():
                found[name] = None

        return module.register_forward_hook(hook)

    modules = dict(model.named_modules())
    norms = tuple(f"{name}." for name, m in modules.items() if isinstance(m, NormAct2d))
    layers = {
        name: m for name, m in modules.items() if f"{name}." in norms or not any(m.children())
    }
    hooks = [watch(name, m) for name, m in layers.items() if not name.startswith(norms)]
    try:
        for images in micro_batches:
            if not torch.isfinite(images).all():
                found["the input images"] = None
            with torch.no_grad(), autocast(images.device, dtype):
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)[:SHOWN]


def describe(
    step: int, skipped: int, loss: float, norm: float, learning_rate: float, layers: list[list[str]]
) -> str:
    """Describe a non-finite update in one line.

    step: its number; skipped: how many updates were skipped before; layers: the affected layers of
    every process, by rank.
    """
    where = "in the loss or the backward pass: every activation is finite"
    if found := {rank: names for rank, names in enumerate(layers) if names}:
        names = ", ".join(dict.fromkeys(name for names in found.values() for name in names))
        ranks = f" of process {', '.join(map(str, found))}" if len(layers) > 1 else ""
        where = f"first in {names}{ranks}"
    limit = f"; {skipped} updates were skipped before, which is the limit" if skipped else ""
    return (
        f"step {step}: loss {loss:g}, gradient norm {norm:g}, learning rate {learning_rate:g}: "
        f"not finite, {where}; "
        f"the weights, and the last checkpoint if there is one, are untouched{limit}"
    )
