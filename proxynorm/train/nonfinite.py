"""Report where a loss or gradient that is not finite began."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from proxynorm.errors import ProxynormError
from proxynorm.nn import NormAct2d
from proxynorm.train.evaluate import autocast
from proxynorm.train.state import TrainState


class NonFiniteError(ProxynormError):
    """Training ended before a non-finite update touched the weights; every process raises it."""


def nonfinite_layers(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> list[str]:
    """Return the layers whose output on `images` (N, C, H, W) is not finite, in forward order."""
    found: list[str] = []

    def check_output(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            # A module that returns its input, as an identity, is not where it began.
            unchanged = output is inputs[0] and not getattr(module, "inplace", False)
            checked = isinstance(output, torch.Tensor) and not unchanged
            if checked and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(check_output(name)) for name, module in layers(model)]
    try:
        with torch.no_grad(), autocast(images.device, dtype):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules without children, and each norm with its activation as one."""
    inside_norms: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, NormAct2d):
            inside_norms += (f"{name}.",)
            yield name, module
        elif not any(module.children()) and not name.startswith(inside_norms):
            yield name, module


def affected(model: nn.Module, micro_batches: list[torch.Tensor], dtype: torch.dtype) -> list[str]:
    """Return the first five layers affected by this process's images, or the images themselves."""
    found: list[str] = []
    for images in micro_batches:
        if not torch.isfinite(images).all():
            found.append("the input images")
        found += [name for name in nonfinite_layers(model, images, dtype) if name not in found]
    return found[:5]


def describe(
    state: TrainState, loss: float, norm: float, learning_rate: float, layers: list[list[str]]
) -> str:
    """Describe the step in one line; layers: the affected ones of every process, by rank."""
    ranks: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, names in enumerate(layers):
        ranks[tuple(names)].append(rank)
    places = []
    for names, found in ranks.items():
        of = f" of process {', '.join(map(str, found))}" if len(layers) > 1 else ""
        places += [f"first in {', '.join(names)}{of}"] if names else []
    where = "; ".join(places) or "in the loss or the backward pass: every activation is finite"
    skipped = state.skipped - 1
    limit = f"; {skipped} updates were skipped before, which is the limit" if skipped > 0 else ""
    return (
        f"step {state.step + 1}: loss {loss:g}, gradient norm {norm:g}, "
        f"learning rate {learning_rate:g}: not finite, {where}; "
        f"the weights, and the last checkpoint if there is one, are untouched{limit}"
    )
