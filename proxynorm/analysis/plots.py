"""Plots of runs, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from proxynorm.files import write_atomic

Rows = Sequence[Mapping[str, Any]]


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, atomically and without the date or versions, so that equal data give equal bytes."""
    FigureCanvasAgg(figure)
    write_atomic(path, lambda stream: figure.savefig(stream, format="png", dpi=120, metadata={"Software": None}))


def plot_curves(runs: Mapping[str, Rows], path: Path) -> None:
    """Training loss (left) and evaluated top-1 (right) against epochs, a colour a run; `runs` maps labels to rows."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for index, (label, rows) in enumerate(runs.items()):
        training = [row for row in rows if row["event"] == "train"]
        evaluations = [row for row in rows if row["event"] == "eval"]
        color = f"C{index % 10}"
        losses.plot([row["epoch"] for row in training], [row["loss"] for row in training], color=color, lw=1, label=label)
        accuracy.plot([row["epoch"] for row in evaluations], [row["top1"] for row in evaluations], "o-", color=color,
                      ms=4, label=label)
    losses.set(xlabel="epoch", ylabel="training loss")
    accuracy.set(xlabel="epoch", ylabel="top-1 (%)")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
    if runs:
        accuracy.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)
