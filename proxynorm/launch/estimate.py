"""How long runs will take: from runs of the same kind, else scaled from others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from proxynorm.launch.runs import Run
from proxynorm.launch.status import last_training_row, read_config

START_SECONDS = 60.0  # for starting a run: queueing, imports, opening the data
Kind = tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run with its start (None: unknown) and where the number comes from."""

    seconds: float | None
    origin: str


class Estimator:
    """Estimates a run from measured runs of its kind; else from the others, scaled; else as stated.

    measured: seconds of the runs of each kind, as `measured_seconds` returns them; stated: the
    seconds that the table states for a run, on the hardware `hardware`.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        measured: Mapping[Kind, list[float]],
        stated: Callable[[Run], float] | None = None,
        hardware: str = "",
    ) -> None:
        self.measured, self.hardware = measured, hardware
        self.stated = stated or (lambda run: 1.0)
        known = {run.kind: run for run in runs if run.kind in measured}
        self.ratios = [median(measured[kind]) / self.stated(known[kind]) for kind in known]

    def __call__(self, run: Run) -> Estimate:
        if run.kind in self.measured:
            return Estimate(median(self.measured[run.kind]), "measured")
        if self.ratios:
            seconds = self.stated(run) * median(self.ratios)
            return Estimate(seconds, f"scaled from {len(self.ratios)} measured kinds of runs")
        if self.hardware:
            return Estimate(self.stated(run), f"estimate for {self.hardware}")
        return Estimate(None, "nothing like it was measured")


def measured_seconds(runs: Sequence[Run], processes: int = 1) -> dict[Kind, list[float]]:
    """Seconds of whole runs by kind, from the folders of `runs`, finished or not."""
    measured: dict[Kind, list[float]] = {}
    for run in runs:
        if (seconds := folder_seconds(run.folder, processes)) is not None:
            measured.setdefault(run.kind, []).append(seconds)
    return measured


def folder_seconds(folder: Path, processes: int) -> float | None:
    """Seconds of the whole run in `folder`, from its latest speed; None if it tells none.

    A run with another number of processes tells none.
    """
    try:
        row = last_training_row(folder)
        environment = json.loads((folder / "environment.json").read_bytes())
        if row is None or environment.get("world_size", 1) != processes:
            return None
        epochs, _ = read_config(folder)
        images = row["images"] / row["epoch"] * epochs
        return images / row["images_per_second"] + START_SECONDS
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
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
    if known and len(known) < len(runs):
        time += f" and {len(runs) - len(known)} runs of unknown time"
    origins = "; ".join(sorted({item.origin for item in estimates}))
    return f"{len(runs)} runs to do, {time} ({origins})" if runs else "nothing to do"
