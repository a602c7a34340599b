"""The power decomposition while a network trains, and the warning when channels collapse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from proxynorm.analysis.power import PowerRow, power_decomposition
from proxynorm.data import Data


def measure(model: nn.Module, data: Data, images: int, batch: int) -> list[PowerRow]:
    """Decompose the power on images spread evenly over the evaluation set."""
    device = next(model.parameters()).device
    split = data.evaluation
    # The set may be ordered by class, so that its first images would not stand for it.
    rows = split.rows[:: max(1, len(split.rows) // images)][:images]
    batches = replace(data, evaluation=replace(split, rows=rows)).eval_loader(batch)
    prepared = (data.prepare(b, device, torch.float32, torch.contiguous_format) for b in batches)
    # The last batch is padded with images that are not valid, and damaged images are not.
    valid = (b.images[b.valid.to(device)] for b in prepared)
    return power_decomposition(model, (images for images in valid if len(images)))


def collapse_warning(rows: Sequence[PowerRow], threshold: float) -> str | None:
    """One line if P1 exceeds `threshold` in a norm, else None."""
    collapsed = [row for row in rows if row.p1 > threshold]
    if not collapsed:
        return None
    worst = max(collapsed, key=lambda row: row.p1)
    return (
        f"channel collapse: P1 exceeds {threshold:g} in {len(collapsed)} of {len(rows)} norms, "
        f"worst {worst.name} (depth {worst.depth}) with {worst.p1:.3f}; "
        "a proxy-normalized norm (norm=…_pn) keeps channels normalized"
    )
