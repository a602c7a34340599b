"""The report of a table: report.md and figures. The same runs give the same bytes."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from proxynorm.analysis.tables import csv_table, latex_table, markdown_table
from proxynorm.cli import as_installed
from proxynorm.errors import ConfigError
from proxynorm.files import write_text
from proxynorm.paper.compare import (
    MARGIN,
    Outcome,
    cell_status,
    interval_text,
    p_value,
    seed_spread,
    span,
    t_test,
)
from proxynorm.paper.figures import draw_figures
from proxynorm.paper.findings import (
    Findings,
    comparison_grid,
    gather,
    loss_ratio,
    powers_by_cell,
    verdicts,
)
from proxynorm.paper.records import Record
from proxynorm.paper.table import Cell, load_table, reported_runs

LABELS = {
    "P": "poster",
    "C": "authors' code",
    "F": "figure caption",
    "D": "digitised from a figure",
    "E": "not the paper's, a yardstick",
}
FLAT = 0.01  # a loss is flat if its loss ratio is at most this far from 1
POWER_NOTE = (
    "P1: share of power in channel-wise constants (docs/method.md), over the norms of a network; "
    "means over seeds."
)
Grid = list[list[str]]  # the header, then the rows
# A table of results in a Markdown file.
BLOCK = re.compile(r"(<!-- table (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write_report(findings: Findings, folder: Path, force: bool = False) -> None:
    """Write report.md, the figures, table.tex and cells.csv into `folder`.

    Raises ConfigError, unless `force`, if the report there has more runs.
    """
    path, count = folder / "report.md", len(findings.records)
    old = re.search(r"^(\d+) runs, ", path.read_text(), re.M) if path.exists() else None
    if old and int(old[1]) > count and not force:
        raise ConfigError(f"{path} has {old[1]} runs, this one {count}; force=true replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    text = report(findings, draw_figures(findings, folder))
    write_text(folder / "table.tex", latex_table(wide_table(findings)) + "\n")
    write_text(folder / "cells.csv", csv_table(comparison_grid(findings)))
    write_text(path, text)


def report(findings: Findings, figures: Mapping[str, str]) -> str:
    """Return the report as Markdown. figures: {file: caption}."""
    table = findings.table
    parts = [f"# {table.title}", table.about.strip(), findings.protocol]
    parts += [f"**{sentence}**" for sentence in verdicts(findings)]
    if table.columns:
        parts += ["## Table", markdown_table(wide_table(findings))]
    parts += ["## Cells", markdown_table(cell_table(findings)), explanation(findings)]
    parts += [f"![{caption}]({file})" for file, caption in figures.items()]
    if powers_by_cell(findings):
        parts += ["## Power after training", markdown_table(power_table(findings)), POWER_NOTE]
    if findings.outcomes:
        comparisons = markdown_table(comparison_table(findings.outcomes))
        parts += ["## Comparisons", comparisons, comparison_notes(findings)]
    parts += ["## How it was made", provenance(findings.records), f"```\n{commands(findings)}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def wide_table(findings: Findings) -> Grid:
    """Return mean ± standard deviation, with the table's column axes across and the others down."""
    table = findings.table
    axes = dict.fromkeys(axis for cell in findings.cells for axis in cell.labels)
    down = [*table.rows, *(axis for axis in axes if axis not in {*table.rows, *table.columns})]

    def label(cell: Cell, axes: Sequence[str]) -> str:
        values = [(axis, cell.labels[axis]) for axis in axes if cell.labels.get(axis) is not None]
        return ", ".join(
            v if isinstance(v, str) else f"{a.rpartition('.')[2]} {v}" for a, v in values
        )

    rows: dict[str, dict[str, str]] = {}
    for cell in findings.cells:
        text = str(findings.samples[cell.name])
        rows.setdefault(label(cell, down), {})[label(cell, table.columns)] = text
    columns = dict.fromkeys(label(cell, table.columns) for cell in findings.cells)
    unnamed = "any" if table.columns else "top1 %"
    grid = [["", *(column or unnamed for column in columns)]]
    grid += [[row, *(texts.get(column, "") for column in columns)] for row, texts in rows.items()]
    return grid


def cell_table(findings: Findings) -> Grid:
    """Return a row per cell: mean ± std, n, reference and difference if any, loss ratio, status."""
    table = findings.table
    references = {reference.cell: reference for reference in table.references}
    header = ["cell", "top1 %", "n"]
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
        grid.append([*row, cell_status(table, sample, findings.failed[cell.name])])
    return grid


def beside_bn(findings: Findings) -> Grid:
    """Return a row per finished cell, with its difference from the same cell with Batch Norm.

    The 95 % interval is given if both have several seeds. Empty columns are left out.
    """
    spread = seed_spread(findings.table, findings.samples)
    grid = [["", "top1 %", "n", "minus bn", "95 % interval"]]
    for cell in findings.measured():
        sample, bn = findings.samples[cell.name], findings.twin(cell, "bn")
        difference = interval = ""
        if bn is not None and cell.norm != "bn":
            difference = f"{sample.mean - bn.mean:+.2f}"
            if min(sample.n, bn.n) > 1:
                interval = interval_text(t_test(sample, bn, spread)[0])
        grid.append([cell.name, str(sample), str(sample.n), difference, interval])
    columns = [column for column in zip(*grid) if any(column[1:])]
    return [list(row) for row in zip(*columns)]


def explanation(findings: Findings) -> str:
    """Return a note that explains the numbers of the cell table."""
    table = findings.table
    ratios = [r for record in findings.records if (r := loss_ratio(record)) is not None]
    flat = sum(abs(ratio - 1) <= FLAT for ratio in ratios)
    text = (
        f"top1 in percent on {table.split}, mean ± standard deviation over n seeds (of "
        f"{table.seeds}). Loss ratio: mean training loss of the last tenth over the tenth before; "
        f"it is within {100 * FLAT:g} % of 1, and the loss flat, in {flat} of {len(ratios)} runs."
    )
    if table.references:
        labels = sorted({reference.label for reference in table.references})
        legend = "; ".join(f"[{label}] {LABELS[label]}" for label in labels)
        sources = "; ".join(dict.fromkeys(reference.source for reference in table.references))
        text += f" References: {legend}. Sources: {sources}."
    return text


def power_table(findings: Findings) -> Grid:
    """Return a row per cell that logged powers: P1 before and after training, over its runs."""
    grid = [["cell", "top1 %", "P1 before, mean", "P1, mean", "P1, largest", "P1, last norm", "n"]]
    before = powers_by_cell(findings, last=False)
    for cell, nets in powers_by_cell(findings).items():
        first, p1 = ([[row.p1 for row in rows] for rows in each] for each in (before[cell], nets))
        means = [fmean(map(fmean, first)), fmean(map(fmean, p1))]
        means += [fmean(map(max, p1)), fmean(values[-1] for values in p1)]
        texts = [f"{mean:.3f}" for mean in means]
        grid.append([cell, str(findings.samples[cell]), *texts, str(len(nets))])
    return grid


def comparison_table(outcomes: Sequence[Outcome]) -> Grid:
    """Return a row per comparison."""
    header = ["claim", "cells", "expected", "difference", "95 % interval", "p", "n", "verdict"]
    rows = [
        [
            item.comparison.claim,
            f"{item.comparison.first} − {item.comparison.second}",
            item.comparison.expect,
            "" if item.difference is None else f"{item.difference:+.2f}",
            "" if item.interval is None else interval_text(item.interval),
            "" if item.p is None else p_value(item.p),
            f"{item.first.n}, {item.second.n}",
            str(item),
        ]
        for item in outcomes
    ]
    return [header, *rows]


def comparison_notes(findings: Findings) -> str:
    table, spread = findings.table, seed_spread(findings.table, findings.samples)
    text = (
        "Differences in points, not corrected for the number of comparisons. Intervals and p by "
        "Welch's t-test, two-sided; with two runs in a cell by Student's, with the standard "
        "deviation of the table. equal: shown if the interval stays above "
        f"−{MARGIN:g} points (matches or exceeds). so far: with fewer seeds than the "
        f"{table.seeds} that were declared."
    )
    if spread is not None:
        own = any(sample.n > 1 for sample in findings.samples.values())
        source = "this table, pooled" if own else table.seed_std_source
        text += f" Standard deviation between seeds: {spread.std:.2f} points ({source})."
    return text


def provenance(records: Sequence[Record]) -> str:
    """State the machines, versions, commits and hours of the runs."""
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
    """List the distinct names, with counts if there are several."""
    counts = sorted(Counter(names).items())
    if len(counts) == 1:
        return counts[0][0]
    return "; ".join(f"{name} ({count} runs)" for name, count in counts)


def commands(findings: Findings) -> str:
    """Return the commands that make the table, and the overrides of each cell."""
    table, script = findings.table, as_installed("python scripts/reproduce.py")
    arguments = " ".join([table.argument, *map(shlex.quote, findings.options)])
    lines = [f"{script} {command} {arguments}" for command in ("run", "report")]
    if table.tuned:
        search = f"table={table.tuned.table}"
        lines = [*(f"{script} {command} {search}" for command in ("run", "choose")), *lines]
    cells = [f"{cell.name}: {' '.join(cell.overrides)}" for cell in findings.cells]
    return "\n".join([*lines, "", *cells])


def rendered(text: str, results: Path) -> str:
    """Return the Markdown text with its tables of results (marked as in BLOCK) regenerated.

    Raises ConfigError for an unknown table.
    """
    return BLOCK.sub(
        lambda match: f"{match[1]}\n{result_table(match['name'], results)}\n\n{match[3]}", text
    )


def result_table(name: str, results: Path) -> str:
    """Return the wide table of the archived runs, and a note on its numbers, as Markdown."""
    table = load_table(name)
    # This folder does not exist, so only the archives in `results` count.
    runs = reported_runs(table, results / "no run folders", results)
    findings = gather(table, runs, results)
    if not findings.records:
        return "No run is kept yet."
    counts = sorted({sample.n for sample in findings.samples.values() if sample.n})
    seeds = f"mean ± standard deviation, {span(counts)} seeds" if counts != [1] else "one seed"
    note = f"top1 (%) on {table.split}, {seeds} a cell."
    return f"{markdown_table(wide_table(findings))}\n\n{note}"
