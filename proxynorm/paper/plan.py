"""The cost of a table: its runs, their status, their time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from proxynorm.analysis.tables import text_table
from proxynorm.errors import ConfigError, DataError
from proxynorm.launch.estimate import describe, duration, estimator
from proxynorm.launch.status import STATES, Status, run_status
from proxynorm.launch.sweep import Jobs
from proxynorm.paper.recipe import other_recipes
from proxynorm.paper.records import kept_status
from proxynorm.paper.search import protocol
from proxynorm.paper.table import Table, TableRun


def plan(
    table: Table, runs: Sequence[TableRun], results: Path, jobs: int = 1, verbose: bool = False
) -> str:
    """A line for each cell with its hours; with `verbose` the command of each run instead."""
    statuses = all_statuses(runs, results, run_status)
    left = [run for run, now in zip(runs, statuses) if now.state not in ("done", "other")]
    done = sum(now.state == "done" for now in statuses)
    estimate = estimator(runs, 1, table.stated_seconds, table.hardware)
    seconds = sum(estimate(run).seconds for run in left)
    lines = [
        f"{table.name}: {table.title}",
        f"{len(runs) // table.seeds} cells × {table.seeds} seeds = {len(runs)} runs; {done} done",
        f"{describe(left, estimate)}; {duration(seconds / jobs)} with jobs={jobs}",
        *filter(None, [protocol(table, results)]),
        *(now.error for now in statuses if now.state == "damaged"),
        *(
            f"{run.name}: another recipe, {now.note}"
            for run, now in zip(runs, statuses)
            if now.state == "other"
        ),
        "",
    ]
    if verbose:
        return "\n".join(lines + [f"[{n.state}] {run.command}" for run, n in zip(runs, statuses)])
    rows = []
    for cell in dict.fromkeys(run.cell.name for run in runs):
        own = [run for run in runs if run.cell.name == cell]
        todo = [run for run in left if run.cell.name == cell]
        hours = estimate(own[0]).seconds / 3600
        count = f"{len(own) - len(todo)}/{len(own)}"
        rows.append([cell, count, f"{hours:.2f}", f"{hours * len(todo):.2f}"])
    return "\n".join([*lines, text_table(["cell", "done", "hours a run", "hours left"], rows)])


def status(runs: Sequence[TableRun], results: Path, width: int | None = None) -> str:
    """A line for each run that has begun, waits or is kept, then the number of runs by state.

    width: of the terminal, to which lines are cut; None leaves them whole.
    """
    try:
        ask = Jobs(runs[0].folder.parent).status
    except ConfigError as error:
        print(f"warning: {error}; showing the run folders' states alone", file=sys.stderr)
        ask = run_status
    statuses = all_statuses(runs, results, ask)
    rows = [(run.name, n.state, n.describe()) for run, n in zip(runs, statuses)]
    rows = [("run", "state", ""), *(row for row in rows if row[1] != "missing")]
    counts = Counter(now.state for now in statuses)
    total = ", ".join(f"{counts[state]} {state}" for state in (*STATES, "missing") if counts[state])
    if len(rows) == 1:
        return total
    first, second = (max(len(row[index]) for row in rows) for index in (0, 1))
    lines = [f"{a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in rows]
    if width is not None:
        lines = [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]
    return "\n".join([*lines, "", total])


def all_statuses(
    runs: Sequence[TableRun], results: Path, ask: Callable[[TableRun], Status]
) -> list[Status]:
    """The status of each run; "other" is a finished run of another recipe than the table's."""
    statuses = []
    for run in runs:
        try:
            statuses.append(kept_status(run, results) or ask(run))
        except DataError as error:
            statuses.append(Status("damaged", error=str(error)))
    done = [run for run, now in zip(runs, statuses) if now.state == "done"]
    notes = {other.run.name: str(other) for other in other_recipes(done, results)}
    return [
        Status("other", note=notes[run.name]) if run.name in notes else now
        for run, now in zip(runs, statuses)
    ]
