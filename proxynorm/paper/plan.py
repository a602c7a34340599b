"""The plan of a table, with times and commands, and the status of its runs, as text."""

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


def plan_text(
    table: Table, runs: Sequence[TableRun], results: Path, jobs: int = 1, verbose: bool = False
) -> str:
    """Return a line per cell with its hours; with `verbose`, the command of each run instead."""
    statuses = all_statuses(runs, results, run_status)
    left = [run for run, status in statuses if status.state not in ("done", "other")]
    done = sum(status.state == "done" for _, status in statuses)
    estimate = estimator(runs)
    seconds = sum(estimate(run).seconds for run in left)
    lines = [
        f"{table.name}: {table.title}",
        f"{len(runs) // table.seeds} cells × {table.seeds} seeds = {len(runs)} runs; {done} done",
        f"{describe(left, estimate)}; {duration(seconds / jobs)} with jobs={jobs}",
        protocol(table, results),
    ]
    for run, status in statuses:
        if status.state in ("damaged", "other"):
            lines.append(f"{run.name}: {status.describe()}")
    lines = [*filter(None, lines), ""]
    if verbose:
        return "\n".join(lines + [f"[{status.state}] {run.command}" for run, status in statuses])
    rows = [["cell", "done", "hours a run", "hours left"]]
    for cell in dict.fromkeys(run.cell.name for run in runs):
        own = [run for run in runs if run.cell.name == cell]
        todo = [run for run in left if run.cell.name == cell]
        hours = estimate(own[0]).seconds / 3600
        count = f"{len(own) - len(todo)}/{len(own)}"
        rows.append([cell, count, f"{hours:.2f}", f"{hours * len(todo):.2f}"])
    return "\n".join([*lines, text_table(rows)])


def status_text(runs: Sequence[TableRun], results: Path) -> str:
    """Return a line per run that is not missing, then the number of runs by state."""
    try:
        get_status = Jobs(runs[0].folder.parent).status
    except ConfigError as error:
        print(f"warning: {error}; showing the states of the run folders only", file=sys.stderr)
        get_status = run_status
    statuses = all_statuses(runs, results, get_status)
    counts = Counter(status.state for _, status in statuses)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    rows = [(r.name, s.state, s.describe()) for r, s in statuses if s.state != "missing"]
    if not rows:
        return total
    name_width = max(len(name) for name, _, _ in rows)
    state_width = max(len(state) for _, state, _ in rows)
    lines = [f"{name:<{name_width}}  {state:<{state_width}}  {text}" for name, state, text in rows]
    return "\n".join([*lines, "", total])


def all_statuses(
    runs: Sequence[TableRun], results: Path, get_status: Callable[[TableRun], Status]
) -> list[tuple[TableRun, Status]]:
    """Return the status of each run. The state of a finished run of another recipe is "other"."""
    pairs = []
    for run in runs:
        try:
            status = kept_status(run, results) or get_status(run)
            others = other_recipes([run], results) if status.state == "done" else []
        except DataError as error:
            status, others = Status("damaged", error=str(error)), []
        for _, changed in others:
            status = Status("other", note=f"another recipe ({changed})")
        pairs.append((run, status))
    return pairs


def kept_status(run: TableRun, results: str | Path) -> Status | None:
    """Return the status of a run if only its archive is left, else None. Raises DataError."""
    record = None if run.folder.exists() else kept_record(run, results)
    if record is None:
        return None
    note = f"kept in {results}"
    if record.failure:
        return Status("failed", error=f"{record.failure} ({note})")
    return done_status(record.summary, note)
