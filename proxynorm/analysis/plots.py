"""Figures, drawn by matplotlib without a display, as PNG or SVG.

A norm and its proxy-normalized version share a colour: dashed without PN, solid with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from proxynorm.analysis.power import TERMS, PowerRow
from proxynorm.files import write_atomic

Rows = Sequence[Mapping[str, Any]]
DEPTH, SHARE = "depth (norm layers)", "share of power"
NORM_COLORS = {"bn": "#4477aa", "ln": "#ee6677", "gn": "#228833", "in": "#aa3377"}
DASHES = {"": "--", "pn": "-", "ws": ":"}
POWER_COLORS = ("#ee6677", "#ccbb44", "#4477aa", "#66ccee")
POWER_LABELS = ("P1: (E μ)²", "P2: Var μ", "P3: (E σ)²", "P4: Var σ")


def norm_label(norm: str) -> str:
    """A norm's name as the paper writes it, ln_pn as LN+PN; any other name as it is."""
    return "+".join(norm.upper().split("_")) if norm_style(norm) else norm


def norm_style(norm: str) -> dict[str, str]:
    """A norm's colour and dashes, as keyword arguments of Axes.plot; empty for any other name."""
    base, _, variant = norm.partition("_")
    if base not in NORM_COLORS or variant not in DASHES:
        return {}
    return {"color": NORM_COLORS[base], "linestyle": DASHES[variant]}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format that the name of `path` ends with.

    Dates, versions and random identifiers are left out, so that equal data give equal bytes.
    """
    suffix = path.suffix.removeprefix(".")
    metadata = {"Date": None, "Creator": None} if suffix == "svg" else {"Software": None}
    # A canvas of its own instead of pyplot, which needs a backend and keeps every figure alive.
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"svg.hashsalt": "proxynorm"}):
        write_atomic(
            path, lambda stream: figure.savefig(stream, format=suffix, dpi=120, metadata=metadata)
        )


def plot_curves(runs: Mapping[str, Rows], path: Path) -> None:
    """Draw training loss and evaluated top-1 against epochs; `runs`: label → rows of metrics.jsonl.

    A label that names a norm is drawn in the norm's style.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for label, rows in runs.items():
        style = {"label": norm_label(label), **norm_style(label)}
        plot_event(losses, rows, "train", "loss", lw=1, **style)
        plot_event(accuracy, rows, "eval", "top1", marker="o", ms=4, **style)
    losses.set(xlabel="epoch", ylabel="training loss (cross-entropy)")
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    for axes in (losses, accuracy):
        axes.grid(alpha=0.3)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    elif runs:
        accuracy.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def plot_event(axes: Axes, rows: Rows, event: str, key: str, **style: Any) -> None:
    """Draw a key of the rows of one event against epochs."""
    points = [(row["epoch"], row[key]) for row in rows if row["event"] == event]
    axes.plot([epoch for epoch, _ in points], [value for _, value in points], **style)


def plot_power(
    panels: Mapping[str, Sequence[PowerRow]],
    path: Path,
    mean_field: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw the four terms, stacked, against depth, a panel a norm or step (the paper's Fig. 2).

    mean_field: P1 that theory expects at each depth, by panel.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    handles = {}
    for (title, power), axes in zip(panels.items(), grid.flat, strict=False):
        depths = [row.depth for row in power]
        terms = [[getattr(row, term) for row in power] for term in TERMS]
        areas = axes.stackplot(depths, *terms, colors=POWER_COLORS)
        handles |= dict(zip(POWER_LABELS, areas, strict=True))
        if mean_field and title in mean_field:
            (line,) = axes.plot(depths, mean_field[title], "k--", lw=1)
            handles["P1, mean field"] = line
        axes.set(title=norm_label(title), xlabel=DEPTH, ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0)
    for axes in grid[:, 0]:
        axes.set_ylabel(SHARE)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    place = "outside lower center"
    figure.legend(handles.values(), handles.keys(), loc=place, ncols=len(handles), fontsize=8)
    save_figure(figure, path)


def plot_p1(
    nets: Mapping[str, Sequence[Sequence[PowerRow]]],
    paths: Sequence[Path],
    mean_field: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw P1 against depth: a line a norm, the mean over its nets, and a band, their range.

    nets: the rows of each net, by norm; mean_field: as in plot_power.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for norm, seeds in nets.items():
        depths = [row.depth for row in seeds[0]]
        layers = [[row.p1 for row in layer] for layer in zip(*seeds, strict=True)]
        means = [sum(layer) / len(layer) for layer in layers]
        (line,) = axes.plot(depths, means, lw=2, label=norm_label(norm), **norm_style(norm))
        lowest, highest = [min(layer) for layer in layers], [max(layer) for layer in layers]
        axes.fill_between(depths, lowest, highest, color=line.get_color(), alpha=0.25, lw=0)
    for norm, values in (mean_field or {}).items():
        label = f"{norm_label(norm)}, mean-field theory"
        axes.plot(range(1, len(values) + 1), values, "k", lw=1, dashes=(1, 1.5), label=label)
    names, count = ", ".join(map(norm_label, nets)), len(next(iter(nets.values())))
    axes.set_title(f"P1 in random nets: {names} (mean and range of {count} nets)")
    axes.set(xlabel=DEPTH, ylabel=f"P1, constant channels ({SHARE})", ylim=(-0.02, 1.02))
    axes.margins(x=0.01)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    for path in paths:
        save_figure(figure, path)
