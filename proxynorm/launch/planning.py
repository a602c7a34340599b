"""What a table would take: its runs, where each stands, commands, time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from proxynorm.errors import ConfigError, DataError
from proxynorm.launch.estimate import Estimator, describe, duration
from proxynorm.launch.runs import STATES, Run, Standing, standing
from proxynorm.launch.sweep import Jobs, as_entry
from proxynorm.paper.recipe import other_recipes
from proxynorm.paper.records import kept_standing
from proxynorm.paper.table import Table


def plan(
    table: Table, runs: Sequence[Run], results: Path, jobs: int, overrides: Sequence[str] = ()
) -> str:
    """The table's runs with their commands and states, and what the missing ones would take."""
    standings = all_standings(runs, results, standing, overrides)
    states = [now.state for now in standings]
    left = [
        as_entry(run, overrides)
        for run, state in zip(runs, states, strict=True)
        if state not in ("done", "other")
    ]
    estimate = Estimator(runs[0].folder.parent, results, table)
    seconds = sum(estimate(entry).seconds or 0 for entry in left)
    lines = [
        f"{table.name}: {table.title}",
        f"{len(runs) // table.seeds} cells × {table.seeds} seeds = {len(runs)} runs; {states.count('done')} done",
        f"{describe(left, estimate)}; {duration(seconds / jobs)} with jobs={jobs}",
        *(now.error for now in standings if now.state == "damaged"),
        *(
            f"{run.name}: another recipe, {now.note}"
            for run, now in zip(runs, standings)
            if now.state == "other"
        ),
        "",
    ]
    return "\n".join(
        lines
        + [f"[{state}] {run.command(overrides)}" for run, state in zip(runs, states, strict=True)]
    )


def status(
    runs: Sequence[Run], results: Path, width: int | None = None, overrides: Sequence[str] = ()
) -> str:
    """One line a run that has begun, waits in SLURM's queue or is kept, then how many there are of each state. width: of
    the terminal, at which a line is cut; None leaves it whole."""
    tell = teller(runs[0].folder.parent)
    standings = list(zip(runs, all_standings(runs, results, tell, overrides), strict=True))
    rows = [
        (run.name, now.state, now.describe()) for run, now in standings if now.state != "missing"
    ]
    counts = Counter(now.state for _, now in standings)
    total = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return "\n".join([*aligned([("run", "state", ""), *rows], width), "", total]) if rows else total


def all_standings(
    runs: Sequence[Run], results: Path, tell: Callable[[Run], Standing], overrides: Sequence[str]
) -> list[Standing]:
    """Where each run stands; "other" is one that is finished, but not what the table and the `overrides` say."""
    standings = [stands(run, results, tell) for run in runs]
    _, others = other_recipes(
        [run for run, now in zip(runs, standings) if now.state == "done"], results, overrides
    )
    notes = {other.run.name: str(other) for other in others}
    return [
        Standing("other", note=notes[run.name]) if run.name in notes else now
        for run, now in zip(runs, standings)
    ]


def stands(run: Run, results: Path, tell: Callable[[Run], Standing]) -> Standing:
    """Where the run stands that is kept alone, by its archive; of any other, what `tell` says."""
    try:
        return kept_standing(run, results) or tell(run)
    except DataError as error:
        return Standing("damaged", error=str(error))


def aligned(rows: Sequence[tuple[str, str, str]], width: int | None) -> list[str]:
    """Lines of columns to the left, each cut to `width` characters."""
    name, state = (max(len(row[index]) for row in rows) for index in (0, 1))
    lines = (f"{row[0]:<{name}}  {row[1]:<{state}}  {row[2]}".rstrip() for row in rows)
    return [
        line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines
    ]


def teller(runs_dir: Path) -> Callable[[Run], Standing]:
    """What tells where a run stands: its files and SLURM, or its files alone where SLURM does not answer."""
    try:
        return Jobs(runs_dir).standing
    except ConfigError as error:
        print(f"warning: {error}; the states are those of the run folders", file=sys.stderr)
        return standing
