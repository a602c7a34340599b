"""Figures of training: loss and accuracy by epoch, accuracy by cell and by batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from proxynorm.analysis.style import draw_band, legend_beside, new_figure, norm_label, norm_style

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl
Styles = Mapping[str, Mapping[str, Any]]
LOSS_POINTS = 60  # per curve; the loss of single batches is noisy


def curves_figure(runs: Mapping[str, Sequence[Rows]], styles: Styles | None = None) -> Figure:
    """Draw training loss and evaluated top-1 against epochs, with a band over seeds.

    runs: {label: rows of each seed}. A label that names a norm is drawn in the norm's style, unless
    `styles` has one for it. With several labels, top-1 is left out if no run was evaluated twice.
    """
    losses = {label: [loss_curve(rows) for rows in seeds] for label, seeds in runs.items()}
    top1 = {label: [event_curve(rows, "eval", "top1") for rows in s] for label, s in runs.items()}
    show_top1 = len(runs) == 1 or any(len(x) > 1 for seeds in top1.values() for x, _ in seeds)
    figure, grid = new_figure(10 if show_top1 else 6.5, 4, columns=1 + show_top1)
    for label in runs:
        style = (styles or {}).get(label) or norm_style(label)
        draw_seeds(grid[0, 0], losses[label], label=norm_label(label), **style)
        if show_top1:
            draw_seeds(grid[0, 1], top1[label], label=norm_label(label), marker="o", ms=3, **style)
    grid[0, 0].set(xlabel="epoch", ylabel="training loss (cross-entropy, nats)")
    show_later_loss(grid[0, 0], [curve for seeds in losses.values() for curve in seeds])
    if show_top1:
        grid[0, 1].set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    else:
        legend_beside(grid[0, -1])
    return figure


def event_curve(rows: Rows, event: str, key: str) -> tuple[list[float], list[float]]:
    """Return the epochs and the finite values of a key in the rows of an event."""
    # A value that is not finite is logged as null.
    rows = [row for row in rows if row["event"] == event and row.get(key) is not None]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def loss_curve(rows: Rows) -> tuple[list[float], list[float]]:
    """Return epochs and training losses, averaged in groups of neighbouring rows."""
    epochs, losses = event_curve(rows, "train", "loss")
    if len(epochs) <= LOSS_POINTS:
        return epochs, losses
    parts = (np.array_split(values, LOSS_POINTS) for values in (epochs, losses))
    return tuple([float(part.mean()) for part in values] for values in parts)


def draw_seeds(axes: Axes, seeds: Sequence[tuple[list, list]], **style: Any) -> None:
    """Draw the curves of a cell's seeds as one band that ends with the shortest."""
    shortest = min((x for x, _ in seeds), key=len)
    if shortest:
        draw_band(axes, shortest, [y[: len(shortest)] for _, y in seeds], **style)


def show_later_loss(axes: Axes, curves: Sequence[tuple[list, list]]) -> None:
    """Fit the axis to the losses after the first fifth of training, where curves are close."""
    late = [y for x, values in curves for e, y in zip(x, values) if e >= 0.2 * x[-1]]
    late = [value for value in late if np.isfinite(value)]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.05
        axes.set_ylim(min(late) - margin, max(late) + margin)


def cells_figure(
    samples: Mapping[str, Sequence[float]],
    references: Mapping[str, float],
    styles: Styles,
    label: str,
) -> Figure:
    """Draw a row per cell: each run faint, mean ± standard deviation bold, a reference as a bar."""
    figure, ((axes,),) = new_figure(7, 0.8 + 0.28 * len(samples))
    for row, (cell, values) in enumerate(samples.items()):
        color = styles[cell]["color"]
        axes.plot(values, [row] * len(values), "o", color=color, alpha=0.3, ms=4)
        spread = stdev(values) if len(values) > 1 else 0
        filled = color if styles[cell].get("linestyle") == "-" else "white"
        axes.errorbar(fmean(values), row, xerr=spread, fmt="o", color=color, mfc=filled, capsize=3)
        if cell in references:
            axes.plot(references[cell], row, "|", color="black", ms=12)
    axes.set_yticks(range(len(samples)), [norm_label(cell) for cell in samples])
    axes.set_ylim(len(samples) - 0.5, -0.5)  # the first on top
    axes.set_title(f"each run, mean ± standard deviation ({seeds_text(samples.values())})", size=9)
    axes.set(xlabel=label)
    return figure


def seeds_text(samples: Iterable[Sequence[float]]) -> str:
    """Return the number of seeds of the samples: "1 seed", "3 seeds" or "2 to 3 seeds"."""
    counts = [len(values) for values in samples]
    least, most = min(counts), max(counts)
    return f"{f'{least} to ' if least < most else ''}{most} seed{'s' if most > 1 else ''}"


def batch_figure(
    panels: Mapping[str, Mapping[str, Mapping[float | None, Sequence[float]]]], label: str
) -> Figure:
    """Draw accuracy against batch sizes: a panel per axis, a line per norm, with bands over seeds.

    panels: {axis label: {norm: {batch size: accuracy of each run}}}. The batch size is None for a
    norm that does not depend on it, which is drawn as a horizontal line.
    """
    figure, grid = new_figure(5 * len(panels) + 1, 4, columns=len(panels), sharey=True)
    for axes, (axis_label, norms) in zip(grid[0], panels.items(), strict=True):
        ticks = sorted({x for values in norms.values() for x in values if x is not None})
        for norm, values in norms.items():
            style = {**norm_style(norm), "label": norm_label(norm)}
            if sizes := sorted(x for x in values if x is not None):
                count = min(len(values[x]) for x in sizes)
                seeds = list(zip(*(values[x][:count] for x in sizes)))
                draw_band(axes, sizes, seeds, marker="o", **style)
            else:
                seeds = [[value] * 2 for value in values[None]]
                draw_band(axes, [ticks[0], ticks[-1]], seeds, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set(xlabel=axis_label)
    grid[0, 0].set_ylabel(label)
    samples = [
        runs for norms in panels.values() for values in norms.values() for runs in values.values()
    ]
    seeds = seeds_text(samples)
    figure.suptitle(seeds if seeds == "1 seed" else f"mean and range over {seeds}", size=10)
    legend_beside(grid[0, -1])
    return figure
