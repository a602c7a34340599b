"""How much longer one run takes than another of the same table, where nothing was measured: by epochs and by activations."""

from __future__ import annotations

import json
import re
from functools import lru_cache

import torch
from torch import nn

from proxynorm.models import create_model
from proxynorm.paper.table import Table
from proxynorm.train.settings import Settings


def activations(settings: Settings) -> int:
    """Elements that the network's convolutions put out for one training image.

    On accelerators they predict the time of a network better than FLOPs do (Radosavovic et al., "Designing Network Design
    Spaces", arXiv 2003.13678): depthwise convolutions have few FLOPs and take long.
    """
    channels = 1 if settings.data.name == "fashion_mnist" else 3
    return _activations(
        json.dumps(settings.model, sort_keys=True), channels, settings.data.image_size
    )


@lru_cache(maxsize=256)
def _activations(model: str, channels: int, size: int) -> int:
    count = 0

    def add(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal count
        count += output.numel()

    arguments = json.loads(model)
    network = create_model(
        arguments.pop("name"), norm="none", num_classes=10, in_chans=channels, **arguments
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad():  # sizes alone, nothing is computed
        network.eval().to("meta")(torch.empty(1, channels, size, size, device="meta"))
    return count


def stated_epochs(table: Table) -> float | None:
    """The epochs that the table's minutes are of, where its hardware says "for N epochs"."""
    match = re.search(r"\bfor ([\d.]+) epochs\b", table.hardware)
    return float(match[1]) if match else None


def relative_cost(table: Table, first: Settings, settings: Settings) -> float:
    """Time of a run of `settings`, of a run of the table's minutes: these are of its first cell, whose settings are `first`,
    and of as many epochs as its hardware says, or of that cell's."""
    epochs = settings.epochs / (stated_epochs(table) or first.epochs)
    return epochs * activations(settings) / activations(first)
