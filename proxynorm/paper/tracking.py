"""The report as a W&B run of its own, in the group of the table's runs."""

from __future__ import annotations

import sys
from pathlib import Path

from proxynorm.cli import first_line
from proxynorm.paper.document import Figure, Grid, to_html
from proxynorm.paper.report import Findings, cell_table, comparison_table, report
from proxynorm.train.tracker import choose_mode


def log_report(findings: Findings, mode: str, folder: Path, project: str) -> None:
    """Log the cells, the comparisons, the figures, the report and the deltas, with W&B's files below `folder`; without W&B it says so.

    Raises ConfigError for an unknown mode.
    """
    mode = choose_mode(mode)
    if mode == "disabled":
        return
    table, blocks = findings.table, report(findings)
    try:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        with wandb.init(
            mode=mode,
            project=project,
            group=table.name,
            job_type="report",
            name=f"{table.name}-report",
            dir=folder,
            tags=["report", f"table={table.name}"],
            settings=wandb.Settings(silent=True, console="off"),
        ) as run:
            content = {
                "cells": as_wandb_table(wandb, cell_table(findings)),
                "comparisons": as_wandb_table(wandb, comparison_table(findings.outcomes)),
                "report": wandb.Html(to_html(table.title, blocks), inject=False),
            }
            content |= {
                f"figure/{block.file.removesuffix('.svg')}": wandb.Html(block.svg, inject=False)
                for block in blocks
                if isinstance(block, Figure)
            }
            run.log(content)
            run.summary.update(deltas(findings))
    except Exception as error:
        print(
            f"warning: the report is not on W&B: {type(error).__name__}: {first_line(error)}",
            file=sys.stderr,
        )


def as_wandb_table(wandb, grid: Grid):
    return wandb.Table(columns=list(grid.header), data=[list(row) for row in grid.rows])


def deltas(findings: Findings) -> dict[str, float]:
    """Mean of each cell, difference from its reference, and difference and p of each comparison, as flat keys."""
    flat = {f"mean/{name}": sample.mean for name, sample in findings.samples.items() if sample.n}
    flat |= {
        f"delta/{reference.cell}": findings.samples[reference.cell].mean - reference.value
        for reference in findings.table.references
        if findings.samples[reference.cell].n
    }
    for outcome in findings.outcomes:
        pair = f"{outcome.comparison.first}-{outcome.comparison.second}"
        flat |= {f"difference/{pair}": outcome.difference} if outcome.difference is not None else {}
        flat |= {f"p/{pair}": outcome.p} if outcome.p is not None else {}
    return flat
