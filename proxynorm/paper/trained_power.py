"""The power decomposition of a table's trained nets beside their accuracy: which nets' channels collapsed in training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import StatisticsError, correlation, fmean
from typing import TYPE_CHECKING, Any

from proxynorm.analysis.power import TERMS, PowerRow
from proxynorm.errors import ConfigError
from proxynorm.launch.runs import Run, read_summary

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainedNet:
    """A finished run: its cell, its final metric in percent, the rows of its last checkpoint's decomposition."""

    run: str
    cell: str
    metric: float
    rows: list[PowerRow]

    def mean(self, term: str) -> float:
        """The mean of a term, "p1" … "p4", over the net's norms."""
        return fmean(getattr(row, term) for row in self.rows)


def trained_nets(
    runs: Sequence[Run], metric: str, images: int, batch: int, device: torch.device
) -> Iterator[TrainedNet]:
    """Measure the last checkpoint of every finished run on evaluation images. Raises ConfigError if none is finished."""
    from proxynorm.analysis.power_monitor import measure
    from proxynorm.train.restore import checkpoint_path, open_evaluation_data, restore

    finished = [(run, summary) for run in runs if (summary := read_summary(run.folder)) is not None]
    if not finished:
        raise ConfigError(
            f"table {runs[0].table}: no finished run under {runs[0].folder.parent}; run it first"
        )
    for run, summary in finished:
        restored = restore(checkpoint_path(str(run.folder), None, "last"))
        data = open_evaluation_data(restored, None, None, None, None)
        rows = measure(restored.model.to(device), data, images, batch)
        yield TrainedNet(run.name, run.cell.name, float(summary[metric]), rows)


def summarize(nets: Sequence[TrainedNet]) -> dict[str, Any]:
    """{"runs": {run: metric and mean terms}, "cells": {cell: their means over seeds, and Pearson's correlation of P1 with
    the metric over the seeds, None where it does not exist}}."""
    cells: dict[str, list[TrainedNet]] = defaultdict(list)
    for net in nets:
        cells[net.cell].append(net)
    return {
        "runs": {net.run: _figures([net]) for net in nets},
        "cells": {
            cell: {**_figures(seeds), "correlation": _correlation(seeds)}
            for cell, seeds in cells.items()
        },
    }


def _figures(nets: Sequence[TrainedNet]) -> dict[str, Any]:
    means = {term: round(fmean(net.mean(term) for net in nets), 6) for term in TERMS}
    return {"n": len(nets), "metric": fmean(net.metric for net in nets), **means}


def _correlation(nets: Sequence[TrainedNet]) -> float | None:
    """Of P1 with the metric; a P1 that is 0 by construction, as BN's, has none."""
    powers = [net.mean("p1") for net in nets]
    if len(nets) < 3 or max(powers) < 1e-4:
        return None
    try:
        return round(correlation(powers, [net.metric for net in nets]), 4)
    except StatisticsError:  # constant
        return None


def plot_against_metric(nets: Sequence[TrainedNet], metric: str, path: Path) -> None:
    """A point a net: its mean P1 (across) and its metric (up), a colour a cell."""
    from matplotlib.figure import Figure

    from proxynorm.analysis.plots import save_figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, cell in enumerate(dict.fromkeys(net.cell for net in nets)):
        seeds = [net for net in nets if net.cell == cell]
        marker = "osD^v"[index // 10 % 5]
        axes.plot(
            [net.mean("p1") for net in seeds],
            [net.metric for net in seeds],
            marker,
            color=f"C{index % 10}",
            ms=5,
            label=cell,
        )
    axes.set(xlabel="P1, mean over the net's norms, after training", ylabel=f"{metric} (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def panels(nets: Sequence[TrainedNet]) -> Mapping[str, Sequence[PowerRow]]:
    """The rows of each run, by its name."""
    return {net.run: net.rows for net in nets}
