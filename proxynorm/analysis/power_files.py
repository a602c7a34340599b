"""Power decompositions as rows of metrics.jsonl and as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from proxynorm.analysis.power import TERMS, PowerRow
from proxynorm.analysis.tables import csv_table
from proxynorm.files import write_text


def to_metrics(rows: Sequence[PowerRow]) -> dict[str, float]:
    """Flat keys p1/NAME … p4/NAME, in the order of depth, for a row of metrics.jsonl."""
    return {f"{term}/{row.name}": getattr(row, term) for term in TERMS for row in rows}


def from_metrics(row: Mapping[str, Any]) -> list[PowerRow]:
    """The inverse of `to_metrics`; other keys are ignored."""
    names = [key.partition("/")[2] for key in row if key.startswith("p1/")]
    return [
        PowerRow(name, depth, *(row[f"{term}/{name}"] for term in TERMS))
        for depth, name in enumerate(names, 1)
    ]


def mean_rows(nets: Sequence[Sequence[PowerRow]]) -> list[PowerRow]:
    """The mean over nets of equal shape, norm by norm."""
    means = []
    for rows in zip(*nets, strict=True):
        terms = (fmean(getattr(row, term) for row in rows) for term in TERMS)
        means.append(PowerRow(rows[0].name, rows[0].depth, *terms))
    return means


def write_csv(path: Path, panels: Mapping[str, Sequence[PowerRow]], panel: str) -> None:
    """Write a line a panel and norm: `panel` (name of the first column), name, depth, p1 … p4."""
    grid: list[list[object]] = [[panel, "name", "depth", *TERMS]]
    grid += [
        [title, row.name, row.depth, *(f"{getattr(row, term):.6f}" for term in TERMS)]
        for title, rows in panels.items()
        for row in rows
    ]
    write_text(path, csv_table(grid))
