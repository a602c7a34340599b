"""The power decomposition while a network trains, and the warning when channels collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from proxynorm.analysis.power import PowerRow, power_decomposition
from proxynorm.data import Data, EvalLoader


@dataclass(frozen=True)
class PowerSettings:
    """every_epochs: epochs between two decompositions, None: never; images: how many of the evaluation set; threshold:
    warn of a channel collapse where P1 exceeds it."""

    every_epochs: int | None = None
    images: int = 256
    threshold: float = 0.9


def measure(model: nn.Module, data: Data, images: int, batch: int) -> list[PowerRow]:
    """The decomposition on images spread evenly over the evaluation set, whose order may follow the classes."""
    device = next(model.parameters()).device
    loader = spread(data.eval_loader(batch, 0, 1), images)
    batches = (
        data.prepare(batch, device, torch.float32, torch.contiguous_format).images[
            batch.valid.to(device)
        ]
        for batch in loader
    )
    return power_decomposition(model, batches)


def spread(loader: EvalLoader, images: int) -> EvalLoader:
    """The loader over about `images` of its rows, evenly spread."""
    stride = max(1, len(loader.split.rows) // images)
    loader.split = replace(loader.split, rows=loader.split.rows[::stride][:images])
    return loader


def collapse_warning(rows: Sequence[PowerRow], threshold: float) -> str | None:
    """One line if P1 exceeds `threshold` somewhere, else None."""
    collapsed = [row for row in rows if row.p1 > threshold]
    if not collapsed:
        return None
    worst = max(collapsed, key=lambda row: row.p1)
    return (
        f"channel collapse: P1 exceeds {threshold:g} in {len(collapsed)} of {len(rows)} norms, worst {worst.name} "
        f"(depth {worst.depth}) with {worst.p1:.3f}; a proxy-normalized norm (norm=…_pn) keeps channels normalized"
    )
