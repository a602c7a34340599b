"""Figures of a table's report. A norm and its PN variant share a colour: dashed and solid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from proxynorm.analysis.plots import save_figure

Curves = Mapping[str, Sequence[tuple[float, float]]]


def cell_styles(norms: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Colour, line style and opacity of each cell, from its norm by cell name.

    Cells of one norm differ in opacity.
    """
    bases = list(dict.fromkeys(norm.removesuffix("_pn") for norm in norms.values()))
    styles, seen = {}, dict.fromkeys(norms.values(), 0)
    for cell, norm in norms.items():
        count = sum(other == norm for other in norms.values())
        styles[cell] = {
            "color": f"C{bases.index(norm.removesuffix('_pn')) % 10}",
            "ls": "-" if norm.endswith("_pn") else "--",
            "alpha": 1 - 0.7 * seen[norm] / max(1, count - 1),
        }
        seen[norm] += 1
    return styles


def plot_cells(
    samples: Mapping[str, Sequence[float]],
    references: Mapping[str, float],
    styles: Mapping[str, Mapping[str, Any]],
    label: str,
    path: Path,
) -> None:
    """A row for each cell: every run faint, mean ± one standard deviation bold, reference a bar."""
    figure = Figure(figsize=(7, 0.8 + 0.28 * len(samples)), layout="constrained")
    axes = figure.subplots()
    for row, (cell, values) in enumerate(samples.items()):
        color = styles[cell]["color"]
        axes.plot(values, [row] * len(values), "o", color=color, alpha=0.3, ms=4)
        spread = stdev(values) if len(values) > 1 else 0
        filled = color if styles[cell]["ls"] == "-" else "white"
        axes.errorbar(fmean(values), row, xerr=spread, fmt="o", color=color, mfc=filled, capsize=3)
        if cell in references:
            axes.plot(references[cell], row, "|", color="black", ms=12)
    axes.set_yticks(range(len(samples)), list(samples))
    axes.invert_yaxis()
    axes.set(xlabel=label)
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def plot_curves(
    curves: Curves, styles: Mapping[str, Mapping[str, Any]], xlabel: str, ylabel: str, path: Path
) -> None:
    """A line for each cell."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for cell, points in curves.items():
        axes.plot(*zip(*points, strict=True), lw=1.3, label=cell, **styles[cell])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)
