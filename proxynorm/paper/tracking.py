"""W&B beside the runs: a comparison run for a table, a demo or a sweep; kept runs uploaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
    group: str,
    mode: str,
    folder: Path,
    tables: Mapping[str, Sequence[Sequence[Any]]],
    figures: Sequence[Path],
    config: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    what: str = "comparison",
    **project: Any,
) -> None:
    """Log a comparison of runs as a run of its own, GROUP-WHAT, in their group.

    Args:
        mode: of the logger: auto, online, offline, disabled.
        folder: where W&B's files go.
        tables: by name, each a header and its rows, of text and numbers.
        figures: PNG files.
        config: what was compared; summary: its figures by name.
        project: project= and entity= of W&B.

    Warns where W&B fails. Raises ConfigError for an unknown mode.
    """
    mode, name = choose_mode(mode), f"{group}-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    options = {"project": "proxynorm", **project, "config": dict(config or {})}
    options |= {"group": group, "job_type": "comparison"}
    run = start_run(mode, name, folder, ["comparison", f"group={group}"], **options)
    if run is None:
        return
    try:
        import wandb

        with run:
            content: dict[str, Any] = {
                key: wandb.Table(columns=list(header), data=[list(row) for row in rows])
                for key, (header, *rows) in tables.items()
            }
            for path in figures:
                content[f"figure/{path.stem}"] = wandb.Image(str(path))
            run.log(content)
            run.summary.update(dict(summary or {}))
    except Exception as error:  # W&B must not cost a report, whatever it raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"warning: {name} is not on W&B: {reason}", file=sys.stderr)


def log_report(findings: Findings, mode: str, report: Path, folder: Path) -> None:
    """Log a table's report: cells, comparisons, verdict and the figures in the folder `report`.

    The report of a selection has a name of its own.
    """
    table, grid = findings.table, comparison_grid(findings)
    tables: dict[str, Any] = {"comparison": grid, "cells": cell_table(findings)}
    if findings.outcomes:
        tables["claims"] = comparison_table(findings.outcomes)
    config = {
        "table": table.name,
        "metric": f"{table.metric} on {table.split}",
        "seeds": table.seeds,
        "protocol": findings.protocol,
        "runs": len(findings.records),
        "cells": {cell.name: list(cell.overrides) for cell in findings.cells},
    }
    summary = {"verdict": " ".join(verdicts(findings))}
    summary |= {f"mean/{cell}": mean for cell, _, mean, *_ in grid[1:]}
    part = [word for word in findings.words if not word.startswith("train=")]
    what = " ".join(["comparison", *part])
    figures = sorted(report.glob("*.png"))
    log_comparison(table.name, mode, folder, tables, figures, config, summary, what=what)


def upload(runs: Sequence[TableRun], results: Path, mode: str, folder: Path) -> list[str]:
    """Put finished runs into W&B from their folders or archives, once a mode; their names.

    Each becomes the run that training would have mirrored, in the group of its table. W&B's files
    go to folder/NAME. Runs that training mirrored itself are left out. Raises DataError for damaged
    files, ConfigError for an unknown mode.
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


def upload_run(record: Record, mode: str, place: Path) -> bool:
    """Replay a run's rows into W&B; whether W&B took them."""
    place.mkdir(parents=True, exist_ok=True)
    run, config = record.run, yaml.safe_load(record.files["config.yaml"])
    settings = settings_from(OmegaConf.create(config))
    own = [tag for tag in settings.logger.tags or () if not tag.startswith(("table=", "cell="))]
    tags = (*own, f"table={run.table}", f"cell={run.cell.name}")
    logger = replace(settings.logger, mode=mode, group=run.table, tags=tags)
    tracker = Tracker(replace(settings, logger=logger), place, run.name, config, resumed=True)
    if tracker.run is None:
        return False
    for row in record.rows:
        tracker.log(row)
    tracker.finish(record.summary)
    return True
