"""Log a table's report to W&B, as a run in the group of the table's runs."""

from __future__ import annotations

import sys
from pathlib import Path

from proxynorm.cli import first_line
from proxynorm.paper.report import Findings, Grid, cell_table, comparison_table
from proxynorm.train.tracker import choose_mode


def log_report(findings: Findings, mode: str, report: Path, folder: Path, project: str) -> None:
    """Log cells, comparisons, differences and the figures beside `report`, with files in `folder`.

    Warns where W&B fails. Raises ConfigError for an unknown mode.
    """
    mode = choose_mode(mode)
    if mode == "disabled":
        return
    name = findings.table.name
    try:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        with wandb.init(
            mode=mode,
            project=project,
            group=name,
            job_type="report",
            name=f"{name}-report",
            dir=folder,
            tags=["report", f"table={name}"],
            settings=wandb.Settings(silent=True, console="off"),
        ) as run:
            grids = {"cells": cell_table(findings)}
            grids["comparisons"] = comparison_table(findings.outcomes)
            content = {key: as_wandb_table(wandb, grid) for key, grid in grids.items()}
            for path in sorted(report.parent.glob("*.png")):
                content[f"figure/{path.stem}"] = wandb.Image(str(path))
            run.log(content)
            run.summary.update(deltas(findings))
    except Exception as error:  # W&B must not cost a report, whatever it raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"warning: the report is not on W&B: {reason}", file=sys.stderr)


def as_wandb_table(wandb, grid: Grid):
    header, *rows = grid
    return wandb.Table(columns=header, data=rows)


def deltas(findings: Findings) -> dict[str, float]:
    """Means, differences from references, differences and p of comparisons, as flat keys."""
    samples = {name: sample for name, sample in findings.samples.items() if sample.n}
    flat = {f"mean/{name}": sample.mean for name, sample in samples.items()}
    for reference in findings.table.references:
        if reference.cell in samples:
            flat[f"delta/{reference.cell}"] = samples[reference.cell].mean - reference.value
    for outcome in findings.outcomes:
        pair = f"{outcome.comparison.first}-{outcome.comparison.second}"
        values = {f"difference/{pair}": outcome.difference, f"p/{pair}": outcome.p}
        flat |= {key: value for key, value in values.items() if value is not None}
    return flat
