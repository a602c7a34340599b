"""How figures look and how they are saved: matplotlib, without a display.

A norm and its proxy-normalized version share a colour: dashed without PN, solid with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from proxynorm.files import write_atomic

COLORS = {"bn": "#4477aa", "ln": "#ee6677", "gn": "#228833", "in": "#aa3377"}
DASHES = {"": "--", "pn": "-", "ws": ":", "ws_pn": "-."}
# Dates, versions and random identifiers, left out so that equal data give equal bytes.
METADATA = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def norm_label(norm: str) -> str:
    """A norm's name as the paper writes it, ln_pn as LN+PN, and a cell's, ln_pn-depth44, with it.

    Any other name stays as it is.
    """
    name, dash, rest = norm.partition("-")
    if not norm_style(name):
        return norm
    return "+".join(name.upper().split("_")) + (f", {rest}" if dash else "")


def norm_style(norm: str) -> dict[str, Any]:
    """A norm's colour and dashes, as keyword arguments of Axes.plot; empty for any other name."""
    base, _, variant = norm.partition("_")
    if base not in COLORS or variant not in DASHES:
        return {}
    return {"color": COLORS[base], "linestyle": DASHES[variant]}


def cell_styles(norms: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The style of each cell, from its norm by cell name; cells of one norm differ in opacity."""
    styles = {}
    for cell, norm in norms.items():
        alike = [other for other in norms if norms[other] == norm]
        fade = alike.index(cell) / max(1, len(alike) - 1)
        styles[cell] = {**(norm_style(norm) or {"color": "black"}), "alpha": 1 - 0.7 * fade}
    return styles


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of that many inches, and its grid of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure, grid


def panel_figure(
    count: int, most: int, size: tuple[float, float], least: float = 0, margin: float = 0
) -> tuple[Figure, np.ndarray]:
    """A figure of `count` panels, at most `most` a row, each `size` wide and high, in inches.

    least: width of the figure; margin: its height beside the panels. Returns it and its axes.
    """
    columns = min(count, most)
    rows = -(-count // columns)
    width, height = max(size[0] * columns, least), size[1] * rows + margin
    figure, grid = new_figure(width, height, rows, columns, sharey=True)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, grid


def draw_band(axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], **style: Any):
    """Draw the mean over seeds as a line, a single point as a dot, and their range as a band."""
    values = np.asarray(seeds, dtype=float)
    marker = {"marker": "o", "ms": 3} if len(x) == 1 else {}
    (line,) = axes.plot(x, values.mean(0), **{"lw": 1.5, **marker, **style})
    shade = {"color": line.get_color(), "alpha": 0.2 * (line.get_alpha() or 1), "lw": 0}
    axes.fill_between(x, values.min(0), values.max(0), **shade)


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it hides no curve."""
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def as_image(figure: Figure) -> np.ndarray:
    """The figure's pixels, (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = ()) -> None:
    """Write a figure atomically as `path`, and beside it in each further one of `formats`."""
    # A canvas of its own instead of pyplot, which needs a backend and keeps every figure alive.
    FigureCanvasAgg(figure)
    for file in (path, *(path.with_suffix(f".{name}") for name in formats)):
        kind = file.suffix.removeprefix(".")
        options = {"format": kind, "dpi": 120, "metadata": METADATA[kind]}
        with matplotlib.rc_context({"svg.hashsalt": "proxynorm"}):
            write_atomic(file, lambda stream, options=options: figure.savefig(stream, **options))
