"""The style of figures, and how they are saved: matplotlib, without a display.

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
COLORS |= {"ln_ws": "#997700", "gn_ws": "#33aabb"}
# Dates and versions are left out, so equal data give equal bytes.
METADATA = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def norm_label(norm: str) -> str:
    """Return the name of a norm or cell as the paper writes it: LN+PN for ln_pn.

    ln_pn-depth44 becomes LN+PN, depth44. Any other name stays as it is.
    """
    name, dash, rest = norm.partition("-")
    if not norm_style(name):
        return norm
    return "+".join(name.upper().split("_")) + (f", {rest}" if dash else "")


def norm_style(norm: str) -> dict[str, Any]:
    """Return the colour and dashes of a norm, arguments of Axes.plot; {} for any other name."""
    base = norm.removesuffix("_pn")
    if base not in COLORS:
        return {}
    return {"color": COLORS[base], "linestyle": "--" if base == norm else "-"}


def cell_styles(norms: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the style of each cell. norms: {cell: norm}. Cells of one norm differ in opacity."""
    styles = {}
    for cell, norm in norms.items():
        alike = [other for other in norms if norms[other] == norm]
        fade = alike.index(cell) / max(1, len(alike) - 1)
        styles[cell] = {**(norm_style(norm) or {"color": "black"}), "alpha": 1 - 0.7 * fade}
    return styles


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure of that size in inches, and its grid of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure, grid


def panel_figure(
    count: int,
    max_columns: int,
    size: tuple[float, float],
    min_width: float = 0,
    extra_height: float = 0,
) -> tuple[Figure, np.ndarray]:
    """Return a figure of `count` panels of that size in inches, and its grid of axes."""
    columns = min(count, max_columns)
    rows = -(-count // columns)
    width, height = max(size[0] * columns, min_width), size[1] * rows + extra_height
    figure, grid = new_figure(width, height, rows, columns, sharey=True)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, grid


def draw_band(
    axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], **style: Any
) -> None:
    """Draw the mean over seeds as a line (a single point as a dot) and their range as a band."""
    values = np.asarray(seeds, dtype=float)
    marker = {"marker": "o", "ms": 3} if len(x) == 1 else {}
    (line,) = axes.plot(x, values.mean(0), **{"lw": 1.5, **marker, **style})
    shade = {"color": line.get_color(), "alpha": 0.2 * (line.get_alpha() or 1), "lw": 0}
    axes.fill_between(x, values.min(0), values.max(0), **shade)


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it hides no curve."""
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def as_image(figure: Figure) -> np.ndarray:
    """Draw the figure and return its pixels, (height, width, 3). wandb.Image would need pyplot."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def save_figure(figure: Figure, path: Path, formats: Sequence[str] = ()) -> None:
    """Write a figure atomically to `path`, and to the same name in each of `formats`."""
    for file in (path, *(path.with_suffix(f".{name}") for name in formats)):
        kind = file.suffix.removeprefix(".")
        options = {"format": kind, "dpi": 120, "metadata": METADATA[kind]}
        with matplotlib.rc_context({"svg.hashsalt": "proxynorm"}):  # else SVG has random ids
            write_atomic(file, lambda stream, options=options: figure.savefig(stream, **options))
