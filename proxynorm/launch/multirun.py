"""A Hydra multirun: its runs one after the other on this machine, or as an array of SLURM jobs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from proxynorm.errors import ConfigError
from proxynorm.launch.estimate import estimator
from proxynorm.launch.local import wait
from proxynorm.launch.runs import TRAIN, Run, say
from proxynorm.launch.slurm import SlurmOptions
from proxynorm.launch.status import FAULT_LINE
from proxynorm.launch.sweep import launch_array
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.preemption import REQUEUE, stop_request
from proxynorm.train.settings import folder_of

# torchrun's count of restarts: the processes of a run meet under it.
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


class Failure(NamedTuple):
    """A run of a sweep that failed: its own words, exit status and last line."""

    words: str
    status: int
    reason: str

    def __str__(self) -> str:
        return f"{self.words}: {self.reason}"


def sweep_runs(sweep: Sequence[Sequence[str]]) -> tuple[list[Run], list[Failure]]:
    """Return a run for each list of overrides, in train.py's folder for it, and what is no run.

    Raises ConfigError if two share a folder.
    """
    found: dict[Path, Run] = {}
    failures = []
    for overrides in sweep:
        try:
            settings = settings_from(compose_config(overrides))
            folder = folder_of(settings)
        except ConfigError as error:
            failures.append(Failure(own_words(overrides, sweep), 2, str(error)))
            continue
        if folder in found:
            advice = "leave out name=" if settings.name else "sweep them apart, by runs_dir="
            raise ConfigError(f"two runs of the sweep have the folder {folder}; {advice}")
        found[folder] = Run(folder, tuple(overrides))
    return list(found.values()), failures


def own_words(overrides: Sequence[str], sweep: Sequence[Sequence[str]]) -> str:
    """Return the overrides that distinguish a run from the others of its sweep."""
    return " ".join(word for word in overrides if not all(word in other for other in sweep))


def train_here(sweep: Sequence[Sequence[str]]) -> tuple[list[Run], list[Failure]]:
    """Train the sweep's runs, each in a process of its own, whatever becomes of the others.

    Returns the runs and what failed. Exits with status 75 after a signal.
    """
    runs, failures = sweep_runs(sweep)
    for failure in failures:
        say(f"left out: {failure}")
    for number, run in enumerate(runs, 1):
        words = own_words(run.arguments, sweep)
        say(f"\n[{number}/{len(runs)}] {words}")
        status, reason = train_run(run, number)
        if status == REQUEUE:
            sys.exit(REQUEUE)
        if status:
            failures.append(Failure(words, status, reason))
    return runs, failures


def train_run(run: Run, number: int) -> tuple[int, str]:
    """Train a run on this terminal; return its exit status and the last line of its errors.

    Stop signals are passed on, and answered with status 75.
    """
    environment = {**os.environ, RESTARTS: f"{os.environ.get(RESTARTS, 0)}.{number}"}
    told: list[str] = []
    with stop_request() as stop:
        process = subprocess.Popen(
            [*TRAIN, *run.arguments],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the run once, through this process
        )
        reader = threading.Thread(target=pass_on, args=(process.stderr, told))
        reader.start()
        try:
            wait(process, stop)
        finally:
            process.kill()  # after a second Ctrl-C
            reader.join()
    status = REQUEUE if stop else process.returncode
    if status < 0:
        return status, f"killed (signal {-status}); run again"
    return status, told[-1] if told else f"exit status {status}"


def pass_on(stream: Any, told: list[str]) -> None:
    """Copy a run's errors to this process's, and keep the lines that explain."""
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.strip() and FAULT_LINE not in line:
            told.append(line.strip().removeprefix("error: "))


def submit(sweep: Sequence[Sequence[str]], options: Mapping[str, Any]) -> tuple[list[Run], int]:
    """Submit the sweep's runs to SLURM; return them and the exit status.

    options: SlurmOptions' fields. Raises ConfigError for a run that cannot be built.
    """
    asked = SlurmOptions(**{**options, "sbatch": list(options["sbatch"])})
    runs, failures = sweep_runs(sweep)
    if failures:
        raise ConfigError(str(failures[0]))
    return runs, launch_array(runs, "proxynorm", asked, estimator(runs, asked.gpus or 1))
