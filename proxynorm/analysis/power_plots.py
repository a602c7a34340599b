"""Figures of the power decomposition: all terms by depth (Fig. 2), P1 by depth and epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from proxynorm.analysis.power import TERMS, PowerRow
from proxynorm.analysis.style import cell_styles, draw_band, legend_beside, norm_label, panel_figure

DEPTH, SHARE = "depth (norm layers)", "share of power"
P1_AXIS = f"P1, constant channels ({SHARE})"
ZERO = 0.002  # P1 below this in all layers is 0, except for the effect of the norm's ε
MOST_BANDS = 6  # per panel; more would hide the lines
POWER_COLORS = ("#ee6677", "#ccbb44", "#4477aa", "#66ccee")
POWER_LABELS = ("P1: (E μ)²", "P2: Var μ", "P3: (E σ)²", "P4: Var σ")


def power_figure(
    panels: Mapping[str, Sequence[PowerRow]],
    mean_field: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draw the four terms, stacked, against depth: a panel per norm or step (the paper's Fig. 2).

    mean_field: {panel: P1 at each depth by mean-field theory}.
    """
    figure, grid = panel_figure(len(panels), 3, (4.2, 2.7), min_width=6.5, extra_height=0.5)
    handles = {}
    for (title, power), axes in zip(panels.items(), grid.flat, strict=False):
        depths = [row.depth for row in power]
        terms = [[getattr(row, term) for row in power] for term in TERMS]
        areas = axes.stackplot(depths, *terms, colors=POWER_COLORS)
        handles |= dict(zip(POWER_LABELS, areas, strict=True))
        if mean_field and title in mean_field:
            (line,) = axes.plot(depths, mean_field[title], "k--", lw=1)
            handles["P1, mean-field theory"] = line
        axes.set(title=norm_label(title), xlabel=DEPTH, ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0)
    for axes in grid[:, 0]:
        axes.set_ylabel(SHARE)
    place = "outside lower center"
    figure.legend(handles.values(), handles.keys(), loc=place, ncols=len(handles), fontsize=8)
    return figure


def p1_figure(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[PowerRow]]]],
    norms: Mapping[str, str] | None = None,
    mean_field: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draw P1 against depth: a line per norm or cell, the mean over its nets, with their range.

    panels: {title: {label: rows of each net}}; norms: {label: norm}, for labels that are no norms;
    mean_field: {norm: P1 at each depth by mean-field theory}.
    """
    figure, grid = panel_figure(len(panels), 2, (7.5, 3.8))
    for axes, (title, nets) in zip(grid.flat, panels.items()):
        styles = cell_styles({label: (norms or {}).get(label, label) for label in nets})
        p1 = {label: [[row.p1 for row in net] for net in seeds] for label, seeds in nets.items()}
        zeros = [label for label, seeds in p1.items() if np.max(seeds) < ZERO]
        drawn = [label for label in p1 if label not in zeros]
        for label in drawn:
            seeds = p1[label] if len(drawn) <= MOST_BANDS else [np.mean(p1[label], 0)]
            depths = range(1, len(seeds[0]) + 1)
            draw_band(axes, depths, seeds, label=norm_label(label), **styles[label])
        if zeros:  # one line for all, because they would hide each other
            names = ",\n".join(map(norm_label, zeros))
            axes.axhline(0, color="black", lw=1.5, label=f"{names}: 0")
        for norm, values in (mean_field or {}).items():
            label, depths = f"{norm_label(norm)},\nmean-field theory", range(1, len(values) + 1)
            axes.plot(depths, values, "k", lw=1, dashes=(1, 1.5), label=label)
        axes.set(xlabel=DEPTH, ylabel=P1_AXIS, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(-0.02, 1.02 if mean_field else None)
        axes.margins(x=0.01)
        legend_beside(axes)
    return figure


def p1_by_epoch_figure(cells: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """Draw P1 against depth during training: a panel per cell, a line per epoch.

    cells: {cell: {epoch: P1 of each norm}}; those whose P1 is always 0 are left out.
    """
    cells = {cell: p1 for cell, p1 in cells.items() if max(map(max, p1.values())) >= ZERO} or cells
    figure, grid = panel_figure(len(cells), 4, (3.2, 2.5), min_width=5, extra_height=0.3)
    last = max(epoch for epochs in cells.values() for epoch in epochs) or 1
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, last), "viridis_r")
    for (cell, epochs), axes in zip(cells.items(), grid.flat, strict=False):
        for epoch, values in epochs.items():
            axes.plot(range(1, len(values) + 1), values, color=scale.to_rgba(epoch), lw=1.3)
        axes.set(title=norm_label(cell), xlabel=DEPTH)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"P1 ({SHARE})")
    figure.colorbar(scale, ax=grid, label="epoch")
    return figure
