"""The comparison of a sweep's runs with each other and with Batch Norm, as a table and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from proxynorm.analysis.tables import markdown_table, text_table
from proxynorm.files import write_text
from proxynorm.launch.runs import Run
from proxynorm.paper.figures import draw_figures
from proxynorm.paper.findings import gather, verdicts
from proxynorm.paper.report import beside_bn, provenance
from proxynorm.paper.table import Cell, Table, TableRun, cell_name
from proxynorm.paper.tracking import log_comparison
from proxynorm.train.config import compose_config, settings_from

NOTE = (
    "top1: top-1 accuracy in percent on the evaluation images after the last epoch, mean ± "
    "standard deviation over n seeds. minus bn: the difference from the cell that differs only "
    "in its norm, with its 95 % interval if both have several seeds, by Welch's t-test (with two "
    "seeds, by Student's, with the standard deviation of all cells)."
)


def write_comparison(
    runs: Sequence[Run], folder: Path, name: str, command: str, failed: str = ""
) -> str:
    """Compare the finished runs of a sweep; write comparison.md and figures into `folder`.

    name: of the group on W&B; failed: a line per failed run. Returns the table and the path of
    comparison.md, as text; "" if no run has finished. Raises DataError if files are damaged.
    """
    table, table_runs = as_table(runs, name)
    findings = gather(replace(table, title=command), table_runs, folder / "results")
    if not findings.measured():
        return ""
    path = folder / "comparison.md"
    set_aside(path, command)
    figures = draw_figures(findings, folder)
    grid = beside_bn(findings)
    parts = [f"# {command}", *(f"**{text}**" for text in verdicts(findings)), markdown_table(grid)]
    parts += [NOTE, failed and f"Failed:\n\n{failed}"]
    parts += [f"![{caption}]({file})" for file, caption in figures.items()]
    parts += ["Runs: " + ", ".join(run.name for run in runs), provenance(findings.records)]
    write_text(path, "\n\n".join(filter(None, parts)) + "\n")
    logger = settings_from(compose_config(runs[0].arguments)).logger
    project = {"project": logger.project, "entity": logger.entity}
    log_comparison(findings, logger.mode, folder, folder, **project)
    return f"{text_table(grid)}\n\n" + "\n".join([*verdicts(findings), str(path)])


def as_table(runs: Sequence[Run], name: str) -> tuple[Table, list[TableRun]]:
    """Return the sweep as a table, with the keys that vary, besides the seed, as its axes."""
    points = [dict(word.split("=", 1) for word in run.arguments if "=" in word) for run in runs]
    varying = [key for key in points[0] if len({point.get(key) for point in points}) > 1]
    axes = [key for key in varying if key != "seed"] or ["norm"]
    table_runs: list[TableRun] = []
    for run, point in zip(runs, points, strict=True):
        settings = settings_from(compose_config(run.arguments))
        # Parsed as YAML, so that numbers are printed and drawn as numbers.
        labels = {key: yaml.safe_load(point.get(key, settings.norm.name)) for key in axes}
        cell = Cell(cell_name(labels), labels, run.arguments)
        table_runs.append(TableRun(run.folder, run.arguments, name, cell, settings.seed))
    blocks = [{key: [value] for key, value in run.cell.labels.items()} for run in table_runs]
    seeds = max(Counter(run.cell.name for run in table_runs).values())
    table = Table(
        name,
        title=name,
        about="",
        train=[],
        cells=blocks,
        rows=axes,
        seeds=seeds,
        minutes=0.0,
        hardware="",
        split="the evaluation images",
    )
    return table, table_runs


def set_aside(path: Path, command: str) -> None:
    """Move the comparison of an earlier, different sweep in the same folder to comparison-N/."""
    if not path.exists() or path.read_text().startswith(f"# {command}\n"):
        return
    number = 1 + len(list(path.parent.glob("comparison-*")))
    target = path.parent / f"comparison-{number}"
    target.mkdir()
    for file in (path, *path.parent.glob("*.png"), *path.parent.glob("*.pdf")):
        file.rename(target / file.name)
