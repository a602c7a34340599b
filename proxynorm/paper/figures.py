"""The figures of a table's report, as PNG and PDF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from proxynorm.analysis.plots import batch_figure, cells_figure, curves_figure
from proxynorm.analysis.power_plots import p1_by_epoch_figure, p1_figure
from proxynorm.analysis.style import cell_styles, save_figure
from proxynorm.paper.findings import Findings, against_batch, p1_by_epoch, powers_by_cell
from proxynorm.paper.table import Cell

# More than this cannot be told apart.
MOST_CURVES = 12  # in one figure
MOST_POWERS = 20  # cells, over several panels
MOST_CELLS = 40  # rows


def draw_figures(findings: Findings, folder: Path) -> dict[str, str]:
    """Draw the figures that the runs have data for, into `folder`. Returns {PNG file: caption}."""
    cells, table = findings.measured(), findings.table
    if not cells:
        return {}
    label = f"top-1 (%) on {table.split}"
    styles = cell_styles({cell.name: cell.norm for cell in cells})
    samples = {cell.name: findings.samples[cell.name].values for cell in cells}
    references = {item.cell: item.value for item in table.references}
    figures = {}
    if len(cells) <= MOST_CELLS:
        caption = f"{label}: every run faint, mean ± one standard deviation bold"
        figures["cells"] = (cells_figure(samples, references, styles, label), caption)
    if len(cells) <= MOST_CURVES:
        runs = {cell.name: [record.rows for record in findings.of_cell(cell)] for cell in cells}
        caption = "training, mean over seeds and their range"
        figures["curves"] = (curves_figure(runs, styles), caption)
    if panels := against_batch(findings):
        caption = f"{label} against batch size, mean over seeds and their range"
        figures["batch"] = (batch_figure(panels, label), caption)
    figures |= power_figures(findings)
    for name, (figure, _) in figures.items():
        save_figure(figure, folder / f"{name}.png", ("pdf",))
    return {f"{name}.png": caption for name, (_, caption) in figures.items()}


def power_figures(findings: Findings) -> dict[str, tuple[Figure, str]]:
    """Draw the powers that the runs logged. Returns {name: (figure, caption)}."""
    last = powers_by_cell(findings)
    if not 0 < len(last) <= MOST_POWERS:
        return {}
    cells = [cell for cell in findings.cells if cell.name in last]
    norms = {cell.name: cell.norm for cell in cells}
    panels = {
        title: {name: last[name] for name in names} for title, names in by_axis(cells).items()
    }
    epochs = {cell.name: p1_by_epoch(findings.of_cell(cell)) for cell in cells}
    shared = {name: p1 for name, p1 in epochs.items() if p1}
    depth = "P1 after training by depth, mean over seeds (and range, if there are few lines)"
    epoch = "P1 by depth while training, mean over seeds, a line an epoch"
    return {
        "power": (p1_figure(panels, norms), depth),
        "power_epochs": (p1_by_epoch_figure(shared), epoch),
    }


def by_axis(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Group the cells by their axes besides the norm: {panel title: cell names}.

    A panel also shows the cells of its norms that have no other axis.
    """
    axes = {cell.name: frozenset(cell.labels.keys() - {"norm"}) for cell in cells}
    panels = {}
    for panel in sorted(set(axes.values()), key=sorted):
        names = ", ".join(sorted(axis.rpartition(".")[2] for axis in panel))
        norms = [cell.norm for cell in cells if axes[cell.name] == panel]
        panels[f"trained networks, by {names or 'norm'}"] = [
            cell.name for cell in cells if axes[cell.name] in (panel, set()) and cell.norm in norms
        ]
    return panels
