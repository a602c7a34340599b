"""The power decomposition of a table's trained networks beside their accuracy."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, fmean
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from proxynorm.analysis.plots import save_figure
from proxynorm.analysis.power import TERMS, PowerRow
from proxynorm.errors import ConfigError
from proxynorm.launch.finished import finished_files
from proxynorm.paper.table import TableRun

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainedNet:
    """A finished run: its cell, its metric in percent, the power of its last checkpoint."""

    run: str
    cell: str
    metric: float
    rows: list[PowerRow]

    def mean(self, term: str) -> float:
        """The mean of a term, "p1" … "p4", over the network's norms."""
        return fmean(getattr(row, term) for row in self.rows)


def trained_nets(
    runs: Sequence[TableRun], metric: str, images: int, batch: int, device: torch.device
) -> Iterator[TrainedNet]:
    """Measure the last checkpoint of every finished run. Raises ConfigError if there is none."""
    from proxynorm.analysis.power_monitor import measure
    from proxynorm.train.restore import checkpoint_path, open_evaluation_data, restore

    finished = [(run, files) for run in runs if (files := finished_files(run.folder))]
    if not finished:
        folder = runs[0].folder.parent
        raise ConfigError(f"table {runs[0].table}: no finished run under {folder}; run it first")
    for run, files in finished:
        restored = restore(checkpoint_path(str(run.folder), None, "last"))
        data = open_evaluation_data(restored).data
        rows = measure(restored.model.to(device), data, images, batch)
        value = float(json.loads(files["summary.json"])[metric])
        yield TrainedNet(run.name, run.cell.name, value, rows)


def summarize(nets: Sequence[TrainedNet]) -> dict[str, Any]:
    """{"runs": {run: n, metric, mean terms}, "cells": {cell: the same over seeds, and Pearson's
    correlation of P1 with the metric}}."""
    cells: dict[str, list[TrainedNet]] = defaultdict(list)
    for net in nets:
        cells[net.cell].append(net)
    summaries = {
        c: {**_means(nets), "correlation": _correlation(nets)} for c, nets in cells.items()
    }
    return {"runs": {net.run: _means([net]) for net in nets}, "cells": summaries}


def _means(nets: Sequence[TrainedNet]) -> dict[str, Any]:
    means = {term: round(fmean(net.mean(term) for net in nets), 6) for term in TERMS}
    return {"n": len(nets), "metric": fmean(net.metric for net in nets), **means}


def _correlation(nets: Sequence[TrainedNet]) -> float | None:
    """Correlation of P1 with the metric; None for few nets or constants, as BN's P1 of 0."""
    powers, values = [net.mean("p1") for net in nets], [net.metric for net in nets]
    if len(nets) < 3 or max(powers) < 1e-4 or len(set(powers)) == 1 or len(set(values)) == 1:
        return None
    return round(correlation(powers, values), 4)


def plot_against_metric(nets: Sequence[TrainedNet], metric: str, path: Path) -> None:
    """A point for each network: mean P1 across, metric up, by cell."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for cell in dict.fromkeys(net.cell for net in nets):
        seeds = [net for net in nets if net.cell == cell]
        axes.plot([net.mean("p1") for net in seeds], [net.metric for net in seeds], "o", label=cell)
    axes.set(xlabel="P1, mean over the network's norms, after training", ylabel=f"{metric} (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
