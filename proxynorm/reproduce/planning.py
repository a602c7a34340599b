"""What a table would take: its runs, where each stands, commands, hours."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from proxynorm.analysis.tables import text_table
from proxynorm.errors import ConfigError
from proxynorm.reproduce.estimate import Estimator, describe
from proxynorm.reproduce.runs import STATES, Run, Standing, standing
from proxynorm.reproduce.sweep import Jobs
from proxynorm.reproduce.table import Table


def plan(table: Table, runs: Sequence[Run], jobs: int, overrides: Sequence[str] = ()) -> str:
    """The table's runs with their commands and states, and what the missing ones would take."""
    states = [standing(run).state for run in runs]
    left = [run for run, state in zip(runs, states, strict=True) if state != "done"]
    estimate = Estimator(table, runs, overrides)
    hours = sum(estimate(run).hours for run in left)
    lines = [
        f"{table.name}: {table.title}",
        f"{len(runs) // table.seeds} cells × {table.seeds} seeds = {len(runs)} runs; {len(runs) - len(left)} done",
        f"{describe(left, estimate)}; {hours / jobs:.1f} h with jobs={jobs}",
        "",
    ]
    return "\n".join(lines + [f"[{state}] {run.command()}" for run, state in zip(runs, states, strict=True)])


def status(runs: Sequence[Run]) -> str:
    """One line a run that has begun or waits in SLURM's queue, then how many there are of each state."""
    tell = teller(runs[0].folder.parent)
    standings = [(run, tell(run)) for run in runs]
    rows = [(run.name, now.state, now.describe()) for run, now in standings if now.state != "missing"]
    counts = Counter(now.state for _, now in standings)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return text_table(("run", "state", ""), rows) + "\n\n" + total if rows else total


def teller(runs_dir: Path) -> Callable[[Run], Standing]:
    """What tells where a run stands: its files and SLURM, or its files alone where SLURM does not answer."""
    try:
        return Jobs(runs_dir).standing
    except ConfigError as error:
        print(f"warning: {error}; the states are those of the run folders", file=sys.stderr)
        return standing
