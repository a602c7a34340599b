"""The cost of a table: its runs, their status, their time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from proxynorm.analysis.tables import text_table
from proxynorm.errors import ConfigError, DataError
from proxynorm.launch.estimate import describe, duration, estimator
from proxynorm.launch.slurm import Jobs
from proxynorm.launch.status import STATES, Status, done_status, run_status
from proxynorm.paper.records import kept_record, other_recipes
from proxynorm.paper.search import protocol
from proxynorm.paper.table import Table, TableRun


def plan(
    table: Table, runs: Sequence[TableRun], results: Path, jobs: int = 1, verbose: bool = False
) -> str:
    """A line for each cell with its hours; with `verbose` the command of each run instead."""
    statuses = all_statuses(runs, results, run_status)
    left = [run for run, now in statuses if now.state not in ("done", "other")]
    done = sum(now.state == "done" for _, now in statuses)
    estimate = estimator(runs)
    seconds = sum(estimate(run).seconds for run in left)
    lines = [
        f"{table.name}: {table.title}",
        f"{len(runs) // table.seeds} cells × {table.seeds} seeds = {len(runs)} runs; {done} done",
        f"{describe(left, estimate)}; {duration(seconds / jobs)} with jobs={jobs}",
        protocol(table, results),
    ]
    for run, now in statuses:
        lines.append(now.error if now.state == "damaged" else "")
        lines.append(f"{run.name}: another recipe, {now.note}" if now.state == "other" else "")
    lines = [*filter(None, lines), ""]
    if verbose:
        return "\n".join(lines + [f"[{now.state}] {run.command}" for run, now in statuses])
    rows = [["cell", "done", "hours a run", "hours left"]]
    for cell in dict.fromkeys(run.cell.name for run in runs):
        own = [run for run in runs if run.cell.name == cell]
        todo = [run for run in left if run.cell.name == cell]
        hours = estimate(own[0]).seconds / 3600
        count = f"{len(own) - len(todo)}/{len(own)}"
        rows.append([cell, count, f"{hours:.2f}", f"{hours * len(todo):.2f}"])
    return "\n".join([*lines, text_table(rows)])


def status(runs: Sequence[TableRun], results: Path) -> str:
    """A line for each run that has begun, waits or is kept, then the number of runs by state."""
    try:
        ask = Jobs(runs[0].folder.parent).status
    except ConfigError as error:
        print(f"warning: {error}; showing the run folders' states alone", file=sys.stderr)
        ask = run_status
    statuses = all_statuses(runs, results, ask)
    counts = Counter(now.state for _, now in statuses)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    begun = [(run, now) for run, now in statuses if now.state != "missing"]
    if not begun:
        return total
    first = max(len(run.name) for run, _ in begun)
    second = max(len(now.state) for _, now in begun)
    lines = [f"{run.name:<{first}}  {now.state:<{second}}  {now.describe()}" for run, now in begun]
    return "\n".join([*lines, "", total])


def all_statuses(
    runs: Sequence[TableRun], results: Path, ask: Callable[[TableRun], Status]
) -> list[tuple[TableRun, Status]]:
    """The status of each run; "other" is a finished run of another recipe than the table's."""
    statuses = {}
    for run in runs:
        try:
            statuses[run.name] = kept_status(run, results) or ask(run)
        except DataError as error:
            statuses[run.name] = Status("damaged", error=str(error))
    done = [run for run in runs if statuses[run.name].state == "done"]
    for other in other_recipes(done, results):
        statuses[other.run.name] = Status("other", note=str(other))
    return [(run, statuses[run.name]) for run in runs]


def kept_status(run: TableRun, results: str | Path) -> Status | None:
    """The status of a run kept as an archive alone; None for any other. Raises DataError."""
    record, note = None if run.folder.exists() else kept_record(run, results), f"kept in {results}"
    if record is None:
        return None
    if record.failure:
        return Status("failed", error=f"{record.failure} ({note})")
    return done_status(record.summary, note)
