"""When the loss or a gradient is not finite: say where it began."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from proxynorm.nn import NormAct2d
from proxynorm.train.evaluate import autocast
from proxynorm.train.state import TrainState


class NonFiniteError(Exception):
    """Training ended before a non-finite update touched the weights."""


def nonfinite_layers(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> list[str]:
    """Names of the leaf modules whose output on `images` (N, C, H, W) is not finite, in the order of the forward pass."""
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(name)
        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in layers(model)]
    try:
        with torch.no_grad(), autocast(images.device, dtype):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that compute something themselves, by name: those without children, and each norm with its activation."""
    norms = [name for name, module in model.named_modules() if isinstance(module, NormAct2d)]
    for name, module in model.named_modules():
        if name in norms or not any(module.children()) and not name.startswith(tuple(f"{norm}." for norm in norms)):
            yield name, module


def affected(model: nn.Module, micro_batches: list[torch.Tensor], dtype: torch.dtype) -> list[str]:
    """The first of the layers whose output is not finite on this process's images, those themselves included."""
    found: list[str] = []
    for images in micro_batches:
        if not torch.isfinite(images).all():
            found.append("the input images")
        found += [name for name in nonfinite_layers(model, images, dtype) if name not in found]
    return found[:5]


def describe(state: TrainState, losses: list[float], layers: list[list[str]], norm: float) -> str:
    """One line: the step, the loss, the gradient norm, the learning rate, the first layers concerned.

    losses and layers: of every process, by rank; the loss told is the first that is not finite.
    """
    loss = next((loss for loss in losses if not math.isfinite(loss)), losses[0])
    places = [f"first in {', '.join(names)}" + (f" of process {rank}" if len(losses) > 1 else "")
              for rank, names in enumerate(layers) if names]
    where = "; ".join(places) or "in the loss or the backward pass: every activation is finite"
    rate = state.optimizer.param_groups[0]["lr"]
    skipped = f"; {state.skipped - 1} updates were skipped before, which is the limit" if state.skipped > 1 else ""
    return (f"step {state.step + 1}: loss {loss:g}, gradient norm {norm:g}, learning rate {rate:g}: not finite, {where}; "
            f"the weights, and the last checkpoint if there is one, are untouched{skipped}")
