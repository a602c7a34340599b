"""A table's report from its runs: report.md and figures, the same bytes from the same runs."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from proxynorm.analysis.tables import markdown_table
from proxynorm.errors import ConfigError
from proxynorm.files import write_text
from proxynorm.launch.status import run_status
from proxynorm.paper.compare import (
    Outcome,
    Sample,
    cell_samples,
    cell_status,
    compare,
    p_value,
    seed_spread,
)
from proxynorm.paper.figures import Curves, cell_styles, plot_cells, plot_curves
from proxynorm.paper.records import FAILURE, Record, as_record, kept_files
from proxynorm.paper.search import protocol
from proxynorm.paper.table import Cell, Table, TableRun

LABELS = {
    "P": "poster",
    "C": "authors' code",
    "F": "figure caption",
    "D": "digitised from a figure",
    "E": "not the paper's, a yardstick",
}
MOST_CURVES = 20
Grid = list[list[str]]  # the header, then the rows


@dataclass(frozen=True)
class Findings:
    """Everything a report is written from. words: further words of its commands, as seeds=2."""

    table: Table
    cells: list[Cell]
    records: list[Record]
    samples: dict[str, Sample]
    outcomes: list[Outcome]
    running: Counter
    failed: Counter
    words: tuple[str, ...] = ()

    def of_cell(self, cell: Cell) -> list[Record]:
        return [record for record in self.records if record.cell == cell.name]


def gather(
    table: Table, runs: Sequence[TableRun], results: str | Path, words: Sequence[str] = ()
) -> Findings:
    """Read what the runs left, in their folders or in `results`. words: as in Findings."""
    records, running, failed = [], Counter(), Counter()
    for run in runs:
        files = kept_files(run, results)
        if files is None:
            running[run.cell.name] += run_status(run).state == "running"
        elif FAILURE in files:
            failed[run.cell.name] += 1
        else:
            records.append(as_record(run, files))
    samples = cell_samples(table, records)
    cells = list({run.cell.name: run.cell for run in runs}.values()) or table.expand()
    outcomes = compare(table, samples)
    return Findings(table, cells, records, samples, outcomes, running, failed, tuple(words))


def write_report(findings: Findings, folder: Path, force: bool = False) -> None:
    """Write report.md and the figures into `folder`.

    Raises ConfigError, unless `force`, if the report there has more runs.
    """
    path, count = folder / "report.md", len(findings.records)
    former = re.search(r"^(\d+) runs, ", path.read_text(), re.M) if path.exists() else None
    if former and int(former[1]) > count and not force:
        raise ConfigError(f"{path} has {former[1]} runs, this one {count}; force=true replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    text = report(findings, draw_figures(findings, folder))
    write_text(path, text)


def report(findings: Findings, figures: Mapping[str, str]) -> str:
    """The report as Markdown. figures: {file: caption}."""
    table = findings.table
    parts = [f"# {table.title}", table.about.strip(), protocol(table)]
    if table.columns:
        parts += ["## Table", as_markdown(wide_table(findings))]
    parts += ["## Cells", as_markdown(cell_table(findings)), explanation(findings)]
    parts += [f"![{caption}]({file})" for file, caption in figures.items()]
    if findings.outcomes:
        comparisons = as_markdown(comparison_table(findings.outcomes))
        parts += ["## Comparisons", comparisons, comparison_notes(findings)]
    parts += ["## How it was made", provenance(findings.records), f"```\n{commands(findings)}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_markdown(grid: Grid) -> str:
    header, *rows = [[text.replace("|", "\\|") for text in row] for row in grid]
    return markdown_table(header, rows)


def wide_table(findings: Findings) -> Grid:
    """Mean ± standard deviation, row axes down, column axes across."""
    table = findings.table

    def label(cell: Cell, axes: Sequence[str]) -> str:
        values = [(axis, cell.labels[axis]) for axis in axes if cell.labels.get(axis) is not None]
        return ", ".join(
            v if isinstance(v, str) else f"{a.rpartition('.')[2]} {v}" for a, v in values
        )

    rows = list(dict.fromkeys(label(cell, table.rows) for cell in findings.cells))
    columns = list(dict.fromkeys(label(cell, table.columns) for cell in findings.cells))
    shown = {
        (label(cell, table.rows), label(cell, table.columns)): str(findings.samples[cell.name])
        for cell in findings.cells
    }
    unnamed = "any" if table.columns else f"{table.metric} %"
    header = ["", *(column or unnamed for column in columns)]
    return [header, *([row, *(shown.get((row, column), "") for column in columns)] for row in rows)]


def cell_table(findings: Findings) -> Grid:
    """A row for each cell: mean ± std, n, reference and difference if any, loss ratio, status."""
    table = findings.table
    references = {reference.cell: reference for reference in table.references}
    header = ["cell", f"{table.metric} %", "n"]
    header += ["reference", "difference"] if references else []
    grid = [[*header, "loss ratio", "status"]]
    for cell in findings.cells:
        sample, reference = findings.samples[cell.name], references.get(cell.name)
        row = [cell.name, str(sample), str(sample.n)]
        if references:
            row.append(f"{reference.value:.2f} [{reference.label}]" if reference else "")
            row.append(f"{sample.mean - reference.value:+.2f}" if reference and sample.n else "")
        ratios = [ratio for r in findings.of_cell(cell) if (ratio := loss_ratio(r)) is not None]
        row.append(f"{fmean(ratios):.3f}" if ratios else "")
        running, failed = findings.running[cell.name], findings.failed[cell.name]
        grid.append([*row, cell_status(table, sample, running, failed, reference)])
    return grid


def loss_ratio(record: Record) -> float | None:
    """Mean training loss of the run's last tenth over that of the tenth before; near 1 is flat."""
    curve, steps = points(record, "train", "step", "loss"), record.summary["steps"]
    last = [loss for step, loss in curve if step > 0.9 * steps]
    before = [loss for step, loss in curve if 0.8 * steps < step <= 0.9 * steps]
    return fmean(last) / fmean(before) if last and before else None


def explanation(findings: Findings) -> str:
    """A note on the numbers of the cell table."""
    table = findings.table
    text = (
        f"{table.metric} in percent on {table.split}, mean ± standard deviation over n seeds (of "
        f"{table.seeds}). Loss ratio: mean training loss of the last tenth over the tenth before."
    )
    if table.references:
        labels = sorted({reference.label for reference in table.references})
        told = "; ".join(f"[{label}] {LABELS[label]}" for label in labels)
        sources = "; ".join(dict.fromkeys(reference.source for reference in table.references))
        text += f" References: {told}. Sources: {sources}."
        text += f" within: at most {table.tolerance:g} points from the reference."
    return text


def draw_figures(findings: Findings, folder: Path) -> dict[str, str]:
    """Draw the cells, the curves of loss and metric, and P1 by depth; {file: caption}."""
    samples = {name: sample.values for name, sample in findings.samples.items() if sample.n}
    if not samples:
        return {}
    table, label = findings.table, f"{findings.table.metric} (%)"
    norms = {cell.name: str(cell.labels.get("norm", "")) for cell in findings.cells}
    styles = cell_styles({name: norm for name, norm in norms.items() if name in samples})
    references = {item.cell: item.value for item in table.references}
    plot_cells(samples, references, styles, f"{label} on {table.split}", folder / "cells.png")
    found = {"cells.png": f"{label}: every run faint, mean ± one standard deviation bold"}
    charts = {
        "loss": (partial(points, event="train", x="epoch", y="loss"), "epoch", "training loss"),
        "curves": (partial(points, event="eval", x="epoch", y=table.metric), "epoch", label),
        "power": (last_power, "norm layer", "P1 after training, share of the power"),
    }
    for name, (curve, x, y) in charts.items():
        curves = mean_curves(findings, curve)
        if 0 < len(curves) <= MOST_CURVES:
            plot_curves(curves, styles, x, y, folder / f"{name}.png")
            found[f"{name}.png"] = f"{y}, mean over seeds"
    return found


def points(record: Record, event: str, x: str, y: str) -> list[tuple[float, float]]:
    rows = [row for row in record.rows if row["event"] == event]
    return [(row[x], row[y]) for row in rows if row.get(y) is not None]


def last_power(record: Record) -> list[tuple[float, float]]:
    """(place, P1) of the norms at the last power row of a run; empty if it logged none."""
    rows = [row for row in record.rows if row["event"] == "power"]
    values = [value for key, value in rows[-1].items() if key.startswith("p1/")] if rows else []
    return [(float(place), value) for place, value in enumerate(values, 1)]


def mean_curves(findings: Findings, curve: Callable[[Record], list[tuple[float, float]]]) -> Curves:
    """For each cell the mean of `curve` over its runs, at the x that all have."""
    curves = {}
    for cell in findings.cells:
        runs = [found for record in findings.of_cell(cell) if (found := dict(curve(record)))]
        shared = sorted(set.intersection(*map(set, runs))) if runs else []
        if len(shared) > 1:
            curves[cell.name] = [(x, fmean(run[x] for run in runs)) for x in shared]
    return curves


def comparison_table(outcomes: Sequence[Outcome]) -> Grid:
    """A row for each comparison."""
    header = ["claim", "cells", "expected", "difference", "95 % interval", "p", "n", "verdict"]
    rows = [
        [
            item.comparison.claim,
            f"{item.comparison.first} − {item.comparison.second}",
            item.comparison.expect,
            "" if item.difference is None else f"{item.difference:+.2f}",
            "" if item.interval is None else f"{item.interval[0]:+.2f} … {item.interval[1]:+.2f}",
            "" if item.p is None else p_value(item.p),
            f"{item.first.n}, {item.second.n}",
            item.verdict,
        ]
        for item in outcomes
    ]
    return [header, *rows]


def comparison_notes(findings: Findings) -> str:
    table, spread = findings.table, seed_spread(findings.table, findings.samples)
    text = (
        "Differences in points; Welch's t-test, two-sided, not corrected for the number of "
        f"comparisons. equal: shown if the interval stays above −{table.margin:g} points (matches "
        "or exceeds)."
    )
    if spread is not None:
        own = any(sample.n > 1 for sample in findings.samples.values())
        source = "this table, pooled" if own else table.seed_std_source
        text += f" Standard deviation between seeds: {spread:.2f} points ({source})."
    return text


def provenance(records: Sequence[Record]) -> str:
    """Machines, versions, commits and hours of the records."""
    if not records:
        return "Nothing has been run yet."
    environments = [record.environment for record in records]
    machines = (
        ", ".join([e["processor"], f"{e['cores']} cores", *e["gpus"]]) for e in environments
    )
    versions = (f"python {e['python']}, torch {e['packages']['torch']}" for e in environments)
    hours = sum(record.summary["train_seconds"] for record in records) / 3600
    return (
        f"{len(records)} runs, {hours:.2f} hours of training (evaluation and start-up left out). "
        f"Machine: {tally(machines)}; CPU threads a run: "
        f"{tally(str(e['threads']) for e in environments)}. Versions: {tally(versions)}. "
        f"Source: {tally(commit_name(e['git']) for e in environments)}."
    )


def commit_name(git: Mapping[str, object]) -> str:
    if not git:
        return "outside a git checkout"
    return f"commit {str(git['commit'])[:12]}" + (" with local changes" if git["dirty"] else "")


def tally(names: Iterable[str]) -> str:
    """Each distinct name, with its count where there are several."""
    counts = sorted(Counter(names).items())
    if len(counts) == 1:
        return counts[0][0]
    return "; ".join(f"{name} ({count} runs)" for name, count in counts)


def commands(findings: Findings) -> str:
    """The commands that make the table, and the overrides of each cell."""
    table, script = findings.table, "python scripts/reproduce.py"
    words = "".join(f" {shlex.quote(word)}" for word in findings.words)
    lines = [f"{script} {word} {table.argument}{words}" for word in ("run", "report")]
    if table.tuned:
        search = [f"{script} {word} table={table.tuned.table}" for word in ("run", "choose")]
        lines = search + lines
    cells = [f"{cell.name}: {' '.join(cell.overrides)}" for cell in findings.cells]
    return "\n".join([*lines, "", *cells])
