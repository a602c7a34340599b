"""Plots of runs, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from proxynorm.analysis.power import PowerRow
from proxynorm.files import write_atomic

Rows = Sequence[Mapping[str, Any]]
POWER_COLORS = ("#ee6677", "#ccbb44", "#4477aa", "#66ccee")
POWER_LABELS = ("P1: (E μ)²", "P2: Var μ", "P3: (E σ)²", "P4: Var σ")


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, atomically and without the date or versions, so that equal data give equal bytes."""
    FigureCanvasAgg(figure)
    write_atomic(
        path,
        lambda stream: figure.savefig(stream, format="png", dpi=120, metadata={"Software": None}),
    )


def plot_curves(runs: Mapping[str, Rows], path: Path) -> None:
    """Training loss (left) and evaluated top-1 (right) against epochs, a colour a run; `runs` maps labels to rows."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for index, (label, rows) in enumerate(runs.items()):
        training = [row for row in rows if row["event"] == "train"]
        evaluations = [row for row in rows if row["event"] == "eval"]
        color = f"C{index % 10}"
        losses.plot(
            [row["epoch"] for row in training],
            [row["loss"] for row in training],
            color=color,
            lw=1,
            label=label,
        )
        accuracy.plot(
            [row["epoch"] for row in evaluations],
            [row["top1"] for row in evaluations],
            "o-",
            color=color,
            ms=4,
            label=label,
        )
    losses.set(xlabel="epoch", ylabel="training loss")
    accuracy.set(xlabel="epoch", ylabel="top-1 (%)")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
    if runs:
        accuracy.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def plot_power(
    panels: Mapping[str, Sequence[PowerRow]],
    path: Path,
    expected: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """The four terms, stacked, against depth, a panel a norm or step, as in the paper's Fig. 2.

    `expected` maps a panel to mean field's P1 at its depths, drawn as a dashed line.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for (title, power), axes in zip(
        panels.items(), grid, strict=False
    ):  # what is left of the grid stays empty
        depths = [row.depth for row in power]
        areas = axes.stackplot(
            depths,
            *([getattr(row, term) for row in power] for term in ("p1", "p2", "p3", "p4")),
            colors=POWER_COLORS,
        )
        if expected and title in expected:
            axes.plot(depths, expected[title], "k--", lw=1)
        axes.set(title=title, xlabel="depth", ylim=(0, 1))
        axes.margins(x=0)
    for axes in list(grid):
        axes.set_visible(False)
    figure.legend(areas, POWER_LABELS, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(figure, path)
