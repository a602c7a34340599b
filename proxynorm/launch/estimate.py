"""How long runs will take: as runs of the same kind took, else as is stated of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from proxynorm.errors import DataError
from proxynorm.launch.runs import Estimate, Run
from proxynorm.launch.status import read_progress, reading

START_SECONDS = 60.0  # for starting a run: queueing, imports, opening the data


def estimator(runs: Sequence[Run], processes: int = 1) -> Callable[[Run], Estimate]:
    """An estimator by what the folders of `runs` tell of runs with that many processes."""
    measured: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for run in runs:
        if seconds := folder_seconds(run.folder, processes):
            measured[run.kind].append(seconds)

    def estimate(run: Run) -> Estimate:
        found = measured.get(run.kind)
        return Estimate(median(found), "measured") if found else run.stated

    return estimate


def folder_seconds(folder: Path, processes: int) -> float | None:
    """Seconds of the whole run in `folder`, from its latest speed; None if it tells none.

    A run with another number of processes tells none.
    """
    try:
        with reading(folder):
            environment = json.loads((folder / "environment.json").read_bytes())
            now = read_progress(folder)
            seconds = now.seconds(now.total) if now else None
            same = environment.get("world_size", 1) == processes
            return seconds + START_SECONDS if seconds and same else None
    except DataError:  # told where the run's status is
        return None


def duration(seconds: float) -> str:
    """Format as seconds, minutes or hours: 40 s, 25 min, 7.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 90 else f"{minutes / 60:,.1f} h"


def describe(runs: Sequence[Run], estimate: Callable[[Run], Estimate]) -> str:
    """The number of runs, their time together and where it comes from."""
    estimates = [estimate(run) for run in runs]
    known = [item.seconds for item in estimates if item.seconds is not None]
    time = duration(sum(known)) if known else "time unknown"
    if 0 < len(known) < len(runs):
        time = f"at least {time}"
    origins = "; ".join(sorted({item.origin for item in estimates}))
    return f"{len(runs)} runs to do, {time} ({origins})" if runs else "nothing to do"
