"""A table's report from its records: Markdown, one HTML file, figures; the same bytes from the same runs."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from proxynorm.analysis.svg import dot_chart, line_chart
from proxynorm.files import write_text
from proxynorm.launch.runs import Run, standing
from proxynorm.paper.comparing import (
    Outcome,
    Sample,
    cell_samples,
    cell_status,
    compare,
    seed_spread,
)
from proxynorm.paper.document import (
    Block,
    Code,
    Figure,
    Grid,
    Heading,
    Paragraph,
    to_html,
    to_markdown,
)
from proxynorm.paper.records import FAILURE, Record, as_record, kept_files
from proxynorm.paper.table import Cell, Table

LABELS = {
    "P": "poster",
    "C": "authors' code",
    "F": "figure caption",
    "D": "digitised from a figure",
    "E": "not the paper's, a yardstick",
}
MOST_CURVES = 20


@dataclass(frozen=True)
class Findings:
    """All that a report is written from. words: what else its commands say, such as seeds=2."""

    table: Table
    cells: list[Cell]
    records: list[Record]
    samples: dict[str, Sample]
    outcomes: list[Outcome]
    running: Counter
    failed: Counter
    words: tuple[str, ...] = ()


def gather(
    table: Table, runs: Sequence[Run], results: str | Path, words: Sequence[str] = ()
) -> Findings:
    """Read what the runs left, in their folders or in `results`. words: as in Findings."""
    found = [(run, kept_files(run, results)) for run in runs]
    records = [
        as_record(run, files) for run, files in found if files is not None and FAILURE not in files
    ]
    failed = Counter(
        run.cell.name for run, files in found if files is not None and FAILURE in files
    )
    running = Counter(
        run.cell.name for run, files in found if files is None and standing(run).state == "running"
    )
    samples = cell_samples(table, records)
    cells = list({run.cell.name: run.cell for run in runs}.values()) or table.expand()
    return Findings(
        table, cells, records, samples, compare(table, samples), running, failed, tuple(words)
    )


def write_report(findings: Findings, folder: Path) -> None:
    """Write report.md, report.html and the figures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = report(findings)
    for block in blocks:
        if isinstance(block, Figure):
            write_text(folder / block.file, block.svg)
    write_text(folder / "report.md", to_markdown(blocks))
    write_text(folder / "report.html", to_html(findings.table.title, blocks))


def report(findings: Findings) -> list[Block]:
    """The report's blocks."""
    table = findings.table
    blocks: list[Block] = [Heading(table.title, 1), Paragraph(table.about.strip())]
    if table.columns:
        blocks += [Heading("Table"), wide_table(findings)]
    blocks += [Heading("Cells"), cell_table(findings), Paragraph(explanation(findings))]
    blocks += figures(findings)
    if findings.outcomes:
        blocks += [
            Heading("Comparisons"),
            comparison_table(findings.outcomes),
            Paragraph(comparison_notes(findings)),
        ]
    return blocks + [
        Heading("How it was made"),
        Paragraph(provenance(findings.records)),
        Code(commands(findings)),
    ]


def wide_table(findings: Findings) -> Grid:
    """Row axes down, column axes across; mean ± std."""
    table = findings.table

    def place(cell: Cell, axes: Sequence[str]) -> str:
        return ", ".join(
            value if isinstance(value, str) else f"{axis.rpartition('.')[2]} {value}"
            for axis in axes
            if (value := cell.labels.get(axis)) is not None
        )

    rows = list(dict.fromkeys(place(cell, table.rows) for cell in findings.cells))
    columns = list(dict.fromkeys(place(cell, table.columns) for cell in findings.cells))
    shown = {
        (place(cell, table.rows), place(cell, table.columns)): str(findings.samples[cell.name])
        for cell in findings.cells
    }
    header = ["", *(column or "any" for column in columns)]
    return Grid(
        header, [[row, *(shown.get((row, column), "") for column in columns)] for row in rows]
    )


def cell_table(findings: Findings) -> Grid:
    """A row a cell: mean ± std, n, reference, difference, status."""
    table, references = (
        findings.table,
        {reference.cell: reference for reference in findings.table.references},
    )
    header = (
        ["cell", f"{table.metric} %", "n"]
        + (["reference", "difference"] if references else [])
        + ["status"]
    )
    rows = []
    for cell in findings.cells:
        sample, reference = findings.samples[cell.name], references.get(cell.name)
        row = [cell.name, str(sample), str(sample.n)]
        if references:
            row.append(f"{reference.value:.2f} [{reference.label}]" if reference else "")
            row.append(f"{sample.mean - reference.value:+.2f}" if reference and sample.n else "")
        status = cell_status(
            table, sample, findings.running[cell.name], findings.failed[cell.name], reference
        )
        rows.append([*row, status])
    return Grid(header, rows)


def explanation(findings: Findings) -> str:
    """What the numbers of the cell table are."""
    table = findings.table
    text = f"{table.metric} in percent on {table.split}, mean ± standard deviation over n seeds (of {table.seeds})."
    labels = sorted({reference.label for reference in table.references})
    if labels:
        told = "; ".join(f"[{label}] {LABELS[label]}" for label in labels)
        sources = "; ".join(dict.fromkeys(reference.source for reference in table.references))
        text += f" References: {told}. Sources: {sources}. within: at most {table.tolerance:g} points from the reference."
    return text


def figures(findings: Findings) -> list[Block]:
    """The dot chart of the cells, curves of the training loss and the metric, P1 against depth where it was logged."""
    samples = {name: sample.values for name, sample in findings.samples.items() if sample.n}
    if not samples:
        return []
    table, records = findings.table, findings.records
    references = {
        reference.cell: reference.value
        for reference in table.references
        if reference.cell in samples
    }
    caption = f"{table.metric} (%): every run faint, mean and ± one standard deviation bold"
    blocks: list[Block] = [
        Figure(
            "cells.svg",
            dot_chart(samples, f"{table.metric} (%)", references),
            caption + ("; a bar across: the reference" if references else ""),
        )
    ]
    charts = [
        ("loss.svg", "train", "epoch", "loss", "training loss, mean over seeds"),
        (
            "curves.svg",
            "eval",
            "epoch",
            table.metric,
            f"{table.metric} (%) on {table.split}, mean over seeds",
        ),
    ]
    for file, event, x, y, caption in charts:
        series = mean_curves(records, partial(points, event=event, x=x, y=y))
        series = {name: series[name] for name in samples if len(series.get(name, ())) > 1}
        if 0 < len(series) <= MOST_CURVES:
            blocks.append(Figure(file, line_chart(series, x, caption.split(",")[0]), caption))
    powers = mean_curves(records, last_power)
    if powers:
        chart = line_chart(
            {name: powers[name] for name in samples if name in powers},
            "norm layer",
            "P1",
            (0.0, 1.0),
        )
        blocks.append(
            Figure(
                "power.svg",
                chart,
                "P1, the channel-wise constant part of the power, after training, mean over seeds",
            )
        )
    return blocks


def points(record: Record, event: str, x: str, y: str) -> list[tuple[float, float]]:
    return [
        (row[x], row[y]) for row in record.rows if row["event"] == event and row.get(y) is not None
    ]


def last_power(record: Record) -> list[tuple[float, float]]:
    """(place, P1) of the norms at the last power row of a run; empty if it logged none."""
    rows = [row for row in record.rows if row["event"] == "power"]
    values = [value for key, value in rows[-1].items() if key.startswith("p1/")] if rows else []
    return [(float(place), value) for place, value in enumerate(values, 1)]


def mean_curves(
    records: Sequence[Record], curve: Callable[[Record], list[tuple[float, float]]]
) -> dict[str, list[tuple[float, float]]]:
    """For each cell the mean over its seeds of `curve`, at the x that all its runs have."""
    collected: dict[str, list[dict[float, float]]] = defaultdict(list)
    for record in records:
        if found := dict(curve(record)):
            collected[record.cell].append(found)
    return {
        cell: [
            (x, fmean(run[x] for run in runs)) for x in sorted(set.intersection(*map(set, runs)))
        ]
        for cell, runs in collected.items()
    }


def comparison_table(outcomes: Sequence[Outcome]) -> Grid:
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
    return Grid(
        ["claim", "cells", "expected", "difference", "95 % interval", "p", "n", "verdict"], rows
    )


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def comparison_notes(findings: Findings) -> str:
    table, spread = findings.table, seed_spread(findings.table, findings.samples)
    text = (
        f"Differences in points; Welch's t-test, two-sided, not corrected for the number of comparisons. "
        f"equal: shown if the interval stays above −{table.margin:g} points (matches or exceeds)."
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
    machines = tally(
        f"{e['processor']}, {e['cores']} cores" + (f", {', '.join(e['gpus'])}" if e["gpus"] else "")
        for e in (record.environment for record in records)
    )
    versions = tally(
        f"python {r.environment['python']}, torch {r.environment['packages']['torch']}"
        for r in records
    )
    commits = tally(commit_name(record.environment["git"]) for record in records)
    threads = tally(str(record.environment["threads"]) for record in records)
    hours = sum(record.summary["train_seconds"] for record in records) / 3600
    return (
        f"{len(records)} runs, {hours:.2f} hours of training (evaluation and start-up left out). "
        f"Machine: {machines}; CPU threads a run: {threads}. "
        f"Versions: {versions}. Source: {commits}."
    )


def commit_name(git: Mapping[str, object]) -> str:
    if not git:
        return "outside a git checkout"
    return f"commit {str(git['commit'])[:12]}" + (" with local changes" if git["dirty"] else "")


def tally(names) -> str:
    """Each distinct name, with its count where there are several."""
    counts = sorted(Counter(names).items())
    return (
        counts[0][0]
        if len(counts) == 1
        else "; ".join(f"{name} ({count} runs)" for name, count in counts)
    )


def commands(findings: Findings) -> str:
    """The commands that make the table, and the overrides of each cell."""
    table = findings.table
    first = (
        [
            f"python scripts/reproduce.py run table={table.tuned.table}",
            f"python scripts/reproduce.py choose table={table.tuned.table}",
        ]
        if table.tuned
        else []
    )
    words = "".join(f" {shlex.quote(word)}" for word in findings.words)
    lines = [
        *first,
        *(
            f"python scripts/reproduce.py {word} {table.argument}{words}"
            for word in ("run", "report")
        ),
        "",
    ]
    return "\n".join(
        lines + [f"{cell.name}: {' '.join(cell.overrides)}" for cell in findings.cells]
    )
