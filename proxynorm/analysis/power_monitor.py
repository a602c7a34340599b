"""The power decomposition of a training run: measurement, rows of metrics, CSV, a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from proxynorm.analysis.power import TERMS, PowerRow, power_decomposition
from proxynorm.analysis.tables import csv_table
from proxynorm.data import Data
from proxynorm.files import write_text


def measure(model: nn.Module, data: Data, images: int, batch: int) -> list[PowerRow]:
    """Decompose the power on images spread evenly over the evaluation set."""
    device = next(model.parameters()).device
    split = data.evaluation
    # The set may be ordered by class: its first images would not represent it.
    rows = split.rows[:: max(1, len(split.rows) // images)][:images]
    batches = replace(data, evaluation=replace(split, rows=rows)).eval_loader(batch)
    prepared = (data.prepare(b, device, torch.float32, torch.contiguous_format) for b in batches)
    # Padding of the last batch and damaged images are not valid.
    valid = (b.images[b.valid.to(device)] for b in prepared)
    return power_decomposition(model, (images for images in valid if len(images)))


def collapse_warning(rows: Sequence[PowerRow], threshold: float) -> str | None:
    """Return a warning in one line if P1 exceeds `threshold` in a norm, else None."""
    collapsed = [row for row in rows if row.p1 > threshold]
    if not collapsed:
        return None
    worst = max(collapsed, key=lambda row: row.p1)
    return (
        f"channel collapse: P1 exceeds {threshold:g} in {len(collapsed)} of {len(rows)} norms, "
        f"worst {worst.name} (depth {worst.depth}) with {worst.p1:.3f}; "
        "a proxy-normalized norm (norm=…_pn) keeps channels normalized"
    )


def to_metrics(rows: Sequence[PowerRow]) -> dict[str, float]:
    """Return the keys p1/NAME … p4/NAME of a row of metrics.jsonl, in the order of depth."""
    return {f"{term}/{row.name}": getattr(row, term) for term in TERMS for row in rows}


def from_metrics(row: Mapping[str, Any]) -> list[PowerRow]:
    """Invert `to_metrics`. Other keys are ignored."""
    names = [key.partition("/")[2] for key in row if key.startswith("p1/")]
    return [
        PowerRow(name, depth, *(row[f"{term}/{name}"] for term in TERMS))
        for depth, name in enumerate(names, 1)
    ]


def mean_rows(nets: Sequence[Sequence[PowerRow]]) -> list[PowerRow]:
    """Average over networks of the same architecture, norm by norm."""
    means = []
    for rows in zip(*nets, strict=True):
        terms = (fmean(getattr(row, term) for row in rows) for term in TERMS)
        means.append(PowerRow(rows[0].name, rows[0].depth, *terms))
    return means


def write_csv(path: Path, panels: Mapping[str, Sequence[PowerRow]], panel: str) -> None:
    """Write a line per panel and norm. panel: the name of the first column."""
    grid: list[list[object]] = [[panel, "name", "depth", *TERMS]]
    grid += [
        [title, row.name, row.depth, *(f"{getattr(row, term):.6f}" for term in TERMS)]
        for title, rows in panels.items()
        for row in rows
    ]
    write_text(path, csv_table(grid))
