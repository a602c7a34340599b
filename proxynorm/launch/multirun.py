"""A Hydra multirun: its runs, and how they are trained one after the other on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from proxynorm.errors import ConfigError
from proxynorm.launch.local import killed, train
from proxynorm.launch.runs import Run, say
from proxynorm.launch.status import last_error
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
        if status:
            failures.append(Failure(words, status, reason))
    return runs, failures


def train_run(run: Run, number: int) -> tuple[int, str]:
    """Train a run on this terminal; return its exit status and the last line of its errors.

    Exits with status 75 after a stop signal, which is passed on to the run.
    """
    restarts = {RESTARTS: f"{os.environ.get(RESTARTS, 0)}.{number}"}
    with tempfile.NamedTemporaryFile() as errors, stop_request() as stop:
        # Shows the errors and keeps them; in a session of its own it outlives Ctrl-C, as the run.
        command = ["tee", errors.name]
        tee = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sys.stderr, start_new_session=True
        )
        with tee:
            status = train(run, stop, restarts, stderr=tee.stdin)
        if stop:
            sys.exit(REQUEUE)
        return status, killed(status) if status < 0 else last_error(Path(errors.name))
