"""When the loss or a gradient is not finite: say where it began."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import nn

from proxynorm.errors import ProxynormError
from proxynorm.nn import NormAct2d
from proxynorm.train.evaluate import autocast
from proxynorm.train.state import TrainState


class NonFiniteError(ProxynormError):
    """Training ended before a non-finite update touched the weights; every process raises it, in the same words."""


def nonfinite_layers(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> list[str]:
    """Names of the leaf modules whose output on `images` (N, C, H, W) is not finite, in the order of the forward pass.

    Modules that hand on their input, as an identity or a dropout of nothing, are left out.
    """
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not isinstance(output, torch.Tensor) or (
                output is inputs[0] and not getattr(module, "inplace", False)
            ):
                return
            if not torch.isfinite(output).all():
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
        if name in norms or (
            not any(module.children()) and not name.startswith(tuple(f"{norm}." for norm in norms))
        ):
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
    ranks: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, names in enumerate(layers):
        ranks[tuple(names)].append(rank)
    places = [
        f"first in {', '.join(names)}" + (f" of {process_ranges(found)}" if len(losses) > 1 else "")
        for names, found in ranks.items()
        if names
    ]
    where = "; ".join(places) or "in the loss or the backward pass: every activation is finite"
    rate = state.optimizer.param_groups[0]["lr"]
    skipped = (
        f"; {state.skipped - 1} updates were skipped before, which is the limit"
        if state.skipped > 1
        else ""
    )
    return (
        f"step {state.step + 1}: loss {loss:g}, gradient norm {norm:g}, learning rate {rate:g}: not finite, {where}; "
        f"the weights, and the last checkpoint if there is one, are untouched{skipped}"
    )


def process_ranges(ranks: list[int]) -> str:
    """Ascending ranks in words: process 3; processes 0–2, 5."""
    runs = [
        [rank for _, rank in run]
        for _, run in groupby(enumerate(ranks), lambda item: item[1] - item[0])
    ]
    words = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"process {words}" if len(ranks) == 1 else f"processes {words}"
