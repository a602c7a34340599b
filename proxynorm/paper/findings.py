"""The results of a table's runs: cells, samples, comparisons, curves, powers, verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from proxynorm.analysis.power import PowerRow
from proxynorm.analysis.power_monitor import from_metrics, mean_rows
from proxynorm.analysis.style import norm_label
from proxynorm.paper.compare import Outcome, Sample, compare, gap_sentence, seed_spread
from proxynorm.paper.records import Record, read_record
from proxynorm.paper.search import protocol
from proxynorm.paper.table import Cell, Table, TableRun


@dataclass(frozen=True)
class Findings:
    """Everything that a report shows. options: of its commands, besides table=, such as seeds=2."""

    table: Table
    cells: list[Cell]
    records: list[Record]
    samples: dict[str, Sample]
    outcomes: list[Outcome]
    failed: Counter
    protocol: str
    options: Sequence[str] = ()

    def of_cell(self, cell: Cell) -> list[Record]:
        return [record for record in self.records if record.cell == cell.name]

    def measured(self) -> list[Cell]:
        """Return the cells with a finished run."""
        return [cell for cell in self.cells if self.samples[cell.name].n]

    def twin(self, cell: Cell, norm: str) -> Sample | None:
        """Return the sample of the same cell with another norm, if it has been run."""
        labels = {**cell.labels, "norm": norm}
        for other in self.measured():
            if other.labels == labels:
                return self.samples[other.name]
        return None


def gather(
    table: Table, runs: Sequence[TableRun], results: str | Path, options: Sequence[str] = ()
) -> Findings:
    """Read the runs from their folders or from `results`. options: as in Findings."""
    records, failed = [], Counter()
    for run in runs:
        record = read_record(run, results)
        if record is None:
            continue
        if record.failure:
            failed[run.cell.name] += 1
        else:
            records.append(record)
    values: dict[str, list[float]] = {cell.name: [] for cell in table.expand()}
    for record in sorted(records, key=lambda record: record.run.seed):
        values[record.cell].append(record.summary["top1"])
    samples = {name: Sample(tuple(top1)) for name, top1 in values.items()}
    cells = list({run.cell.name: run.cell for run in runs}.values()) or table.expand()
    outcomes, search = compare(table, samples), protocol(table, results)
    return Findings(table, cells, records, samples, outcomes, failed, search, options)


def verdicts(findings: Findings) -> list[str]:
    """Return how much of the gap to BN PN closes: a sentence per cell of LN or GN.

    The same cell must have been run with PN and with BN. IN is left out, because the paper does not
    claim that it matches BN. A search has no verdicts either.
    """
    if findings.table.search is not None:
        return []
    sentences, spread = [], seed_spread(findings.table, findings.samples)
    for cell in findings.measured():
        norm = cell.norm
        bn, proxied = findings.twin(cell, "bn"), findings.twin(cell, f"{norm}_pn")
        if norm not in ("ln", "gn") or bn is None or proxied is None:
            continue
        others = [f"{axis.rpartition('.')[2]} {v}" for axis, v in cell.labels.items() if v != norm]
        plain = findings.samples[cell.name]
        sentence = gap_sentence(bn, plain, proxied, norm_label(norm), spread)
        sentences.append(": ".join([", ".join(others), sentence] if others else [sentence]))
    return sentences


def comparison_grid(findings: Findings) -> list[list[Any]]:
    """Return a row per cell, as numbers, with the difference from the same cell with Batch Norm."""
    rows: list[list[Any]] = [["cell", "norm", "top1", "std", "n", "minus bn"]]
    for cell in findings.measured():
        sample, bn = findings.samples[cell.name], findings.twin(cell, "bn")
        difference = None if bn is None else sample.mean - bn.mean
        rows.append([cell.name, cell.norm, sample.mean, sample.std, sample.n, difference])
    return rows


def against_batch(findings: Findings) -> dict[str, dict[str, dict[float | None, Sequence[float]]]]:
    """Return the top-1 of runs against batch sizes, {axis label: {norm: {value: top-1 of runs}}}.

    The value is None for a norm that has no such axis.
    """
    labels = {"norm_batch": "images that share Batch Norm's statistics", "batch": "batch (images)"}
    panels = {}
    for axis, label in labels.items():
        norms: dict[str, dict[float | None, Sequence[float]]] = {}
        for cell in findings.measured():
            own = with_batch(cell) if axis == "batch" else cell.labels
            if own.keys() <= {"norm", axis} and "norm" in own:
                values = norms.setdefault(own["norm"], {})
                values[own.get(axis)] = findings.samples[cell.name].values
        if sum(axis in cell.labels for cell in findings.measured()) > 1:
            panels[label] = norms
    return panels


def with_batch(cell: Cell) -> dict[str, Any]:
    """Return the labels with the batch of the recipe, and without a norm_batch that equals it."""
    given = [text for text in cell.overrides if text.startswith("batch=")]
    if not given:
        return cell.labels
    batch = int(given[-1].removeprefix("batch="))
    rest = {
        key: value for key, value in cell.labels.items() if (key, value) != ("norm_batch", batch)
    }
    return {**rest, "batch": batch}


def loss_ratio(record: Record) -> float | None:
    """Return the mean training loss of a run's last tenth, divided by that of the tenth before."""
    steps = record.summary["steps"]
    curve = [(row["step"], row["loss"]) for row in record.rows if row["event"] == "train"]
    last = [loss for step, loss in curve if step > 0.9 * steps]
    before = [loss for step, loss in curve if 0.8 * steps < step <= 0.9 * steps]
    return fmean(last) / fmean(before) if last and before else None


def powers(record: Record) -> dict[float, list[PowerRow]]:
    """Return the power decompositions that a run logged, by epoch."""
    return {row["epoch"]: from_metrics(row) for row in record.rows if row["event"] == "power"}


def powers_by_cell(findings: Findings, last: bool = True) -> dict[str, list[list[PowerRow]]]:
    """Return each run's last (or first) power decomposition, by cell, for cells that logged any."""
    by_cell: dict[str, list[list[PowerRow]]] = {}
    for record in findings.records:
        if logged := powers(record):
            epoch = max(logged) if last else min(logged)
            by_cell.setdefault(record.cell, []).append(logged[epoch])
    return by_cell


def p1_by_epoch(records: Sequence[Record]) -> dict[float, list[float]]:
    """Return {epoch: P1 of each norm, averaged over the runs}, for epochs that all runs logged."""
    logged = [powers(record) for record in records]
    return {
        epoch: [row.p1 for row in mean_rows([run[epoch] for run in logged])]
        for epoch in sorted(set.intersection(*map(set, logged)))
    }
