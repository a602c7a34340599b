"""How long runs take: as measured on runs of the same kind, else as their table states."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from proxynorm.errors import DataError
from proxynorm.launch.runs import Estimate, Run
from proxynorm.launch.status import read_progress, reading

START_SECONDS = 60.0  # added to each run: queueing, imports, opening the data


def estimator(runs: Sequence[Run], processes: int = 1) -> Callable[[Run], Estimate]:
    """Return a function that estimates a run's time from the folders of `runs`.

    Only runs that were trained by that number of processes are used.
    """
    measured: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for run in runs:
        if seconds := folder_seconds(run.folder, processes):
            measured[run.kind].append(seconds)

    def estimate(run: Run) -> Estimate:
        seconds = measured.get(run.kind)
        return Estimate(median(seconds), "measured") if seconds else run.stated

    return estimate


def folder_seconds(folder: Path, processes: int) -> float | None:
    """Return how many seconds the whole run in `folder` takes at its latest speed.

    None if the speed is not known, or was measured with another number of processes.
    """
    try:
        with reading(folder):
            environment = json.loads((folder / "environment.json").read_bytes())
            row = read_progress(folder)
            if row is None or environment.get("world_size", 1) != processes:
                return None
            speed = row.get("images_per_second")  # absent from the first row after a start
            images = row["images"] / row["step"] * row["total"]
            return images / speed + START_SECONDS if speed else None
    except DataError:  # reported with the run's status
        return None


def duration(seconds: float) -> str:
    """Format as seconds, minutes or hours: 40 s, 25 min, 7.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 90 else f"{minutes / 60:,.1f} h"


def describe(runs: Sequence[Run], estimate: Callable[[Run], Estimate]) -> str:
    """Return the number of runs, their total time and the origin of the estimate, in words."""
    if not runs:
        return "nothing to do"
    estimates = [estimate(run) for run in runs]
    known = [item.seconds for item in estimates if item.seconds is not None]
    time = duration(sum(known)) if known else "time unknown"
    if 0 < len(known) < len(runs):
        time = f"at least {time}"
    origins = "; ".join(sorted({item.origin for item in estimates}))
    return f"{len(runs)} runs to do, {time} ({origins})"
