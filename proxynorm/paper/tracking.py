"""W&B beyond what runs log themselves: comparison runs, and the upload of finished runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from proxynorm.cli import first_line
from proxynorm.files import write_text
from proxynorm.paper.findings import Findings, comparison_grid, verdicts
from proxynorm.paper.records import Record, read_record
from proxynorm.paper.report import cell_table, comparison_table
from proxynorm.paper.table import TableRun
from proxynorm.train.config import settings_from
from proxynorm.train.tracker import Tracker, choose_mode, start_run


def log_comparison(
    findings: Findings, mode: str, figures: Path, folder: Path, **project: Any
) -> None:
    """Log a comparison as the W&B run TABLE-comparison, named with its selection (cells=, seeds=).

    figures: folder of the PNG files; folder: for W&B's files; project: project=, entity= of W&B.
    If W&B fails, a warning is printed. Raises ConfigError for an unknown mode.
    """
    table, grid = findings.table, comparison_grid(findings)
    selection = [word for word in findings.options if not word.startswith("train=")]
    mode, name = choose_mode(mode), " ".join([f"{table.name}-comparison", *selection])
    config = {
        "table": table.name,
        "title": table.title,
        "metric": f"top1 on {table.split}",
        "seeds": table.seeds,
        "protocol": findings.protocol,
        "runs": len(findings.records),
        "cells": {cell.name: list(cell.overrides) for cell in findings.cells},
    }
    options = {"project": "proxynorm", **project, "config": config, "group": table.name}
    folder.mkdir(parents=True, exist_ok=True)
    tags = ["comparison", f"group={table.name}"]
    run = start_run(mode, name, folder, tags, job_type="comparison", **options)
    if run is None:
        return
    try:
        import wandb

        tables: dict[str, Any] = {"comparison": grid, "cells": cell_table(findings)}
        if findings.outcomes:
            tables["claims"] = comparison_table(findings.outcomes)
        content = {
            key: wandb.Table(columns=list(header), data=[list(row) for row in rows])
            for key, (header, *rows) in tables.items()
        }
        paths = sorted(figures.glob("*.png"))
        images = {f"figure/{path.stem}": wandb.Image(str(path)) for path in paths}
        with run:
            run.log(content | images)
            means = {f"mean/{cell}": mean for cell, _, mean, *_ in grid[1:]}
            run.summary.update({"verdict": " ".join(verdicts(findings)), **means})
    except Exception as error:  # no failure of W&B may prevent a report
        reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"warning: {name} is not on W&B: {reason}", file=sys.stderr)


def upload_runs(runs: Sequence[TableRun], results: Path, mode: str, folder: Path) -> list[str]:
    """Log finished runs to W&B from their folders or archives, and return their names.

    Each becomes the run that training would have logged, in the group of its table. W&B's files go
    to folder/NAME. Runs are skipped if training logged them or they were uploaded in this mode
    before. Raises DataError for damaged files, ConfigError for an unknown mode.
    """
    names, mode = [], choose_mode(mode)
    for run in runs:
        marker = folder / run.name / "uploaded"
        if (run.folder / "wandb_id.txt").exists():
            continue
        if marker.exists() and marker.read_text() == f"{mode}\n":
            continue
        record = read_record(run, results)
        if record is None or record.failure or not upload_run(record, mode, marker.parent):
            continue
        write_text(marker, f"{mode}\n")
        names.append(run.name)
    return names


def upload_run(record: Record, mode: str, folder: Path) -> bool:
    """Log the rows of a run to W&B. Returns False if W&B is not available."""
    folder.mkdir(parents=True, exist_ok=True)
    run, config = record.run, yaml.safe_load(record.files["config.yaml"])
    settings = settings_from(OmegaConf.create(config))
    own = [tag for tag in settings.logger.tags or () if not tag.startswith(("table=", "cell="))]
    tags = (*own, f"table={run.table}", f"cell={run.cell.name}")
    logger = replace(settings.logger, mode=mode, group=run.table, tags=tags)
    # resumed: an upload that was interrupted continues in the same W&B run.
    tracker = Tracker(replace(settings, logger=logger), folder, run.name, config, resumed=True)
    if tracker.run is None:
        return False
    for row in record.rows:
        tracker.log(row)
    tracker.finish(record.summary)
    return True
