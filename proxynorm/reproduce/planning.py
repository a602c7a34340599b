"""What a table would take: its runs, where each stands, commands, hours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean

from proxynorm.analysis.tables import text_table
from proxynorm.reproduce.runs import STATES, Run, read_summary, standing
from proxynorm.reproduce.sweep import Jobs
from proxynorm.reproduce.table import Table


def run_hours(table: Table, runs: Sequence[Run]) -> tuple[float, str]:
    """Hours of one run and where the figure comes from: the mean of the finished ones, else the table's estimate."""
    seconds = [summary["train_seconds"] for run in runs if (summary := read_summary(run.folder))]
    if seconds:
        return mean(seconds) / 3600, f"mean of {len(seconds)} finished runs, training alone"
    return table.minutes / 60, f"estimate for {table.hardware}"


def plan(table: Table, runs: Sequence[Run], jobs: int) -> str:
    """The table's runs with their commands and states, and the hours of what is missing."""
    states = [standing(run).state for run in runs]
    left = sum(state != "done" for state in states)
    hours, origin = run_hours(table, runs)
    lines = [
        f"{table.name}: {table.title}",
        f"{len(runs) // table.seeds} cells × {table.seeds} seeds = {len(runs)} runs; "
        f"{len(runs) - left} done, {left} to do",
        f"{hours:.2f} h a run ({origin}); {left * hours:.1f} h of runs left, "
        f"{left * hours / jobs:.1f} h with jobs={jobs}",
        "",
    ]
    return "\n".join(lines + [f"[{state}] {run.command()}" for run, state in zip(runs, states, strict=True)])


def status(runs: Sequence[Run]) -> str:
    """One line a run that has begun or waits in SLURM's queue, then how many there are of each state."""
    jobs = Jobs(runs[0].folder.parent)
    standings = [(run, jobs.standing(run)) for run in runs]
    rows = [(run.name, now.state, now.describe()) for run, now in standings if now.state != "missing"]
    counts = Counter(now.state for _, now in standings)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return text_table(("run", "state", ""), rows) + "\n\n" + total if rows else total
