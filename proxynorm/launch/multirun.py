"""The runs of a Hydra multirun, and their training one after the other on this machine."""

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

# torchrun's count of restarts. The processes of a run use it to find each other, so each run of a
# sweep gets its own value.
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


class Failure(NamedTuple):
    """A failed run of a sweep: the overrides that set it apart, its exit status, the reason."""

    overrides: str
    status: int
    reason: str

    def __str__(self) -> str:
        return f"{self.overrides}: {self.reason}"


def sweep_runs(sweep: Sequence[Sequence[str]]) -> tuple[list[Run], list[Failure]]:
    """Return a run for each list of overrides, and a failure for each list that is not valid.

    Raises ConfigError if two runs share a folder.
    """
    runs: dict[Path, Run] = {}
    failures = []
    for overrides in sweep:
        try:
            settings = settings_from(compose_config(overrides))
            folder = folder_of(settings)
        except ConfigError as error:
            failures.append(Failure(own_overrides(overrides, sweep), 2, str(error)))
            continue
        if folder in runs:
            advice = "leave out name=" if settings.name else "sweep them apart, by runs_dir="
            raise ConfigError(f"two runs of the sweep have the folder {folder}; {advice}")
        runs[folder] = Run(folder, tuple(overrides))
    return list(runs.values()), failures


def own_overrides(overrides: Sequence[str], sweep: Sequence[Sequence[str]]) -> str:
    """Return the overrides that distinguish a run from the others of its sweep."""
    return " ".join(word for word in overrides if not all(word in other for other in sweep))


def train_here(sweep: Sequence[Sequence[str]]) -> tuple[list[Run], list[Failure]]:
    """Train the runs of a sweep, each in its own process. A failure does not end the sweep.

    Returns the runs and the failures. Exits with status 75 after a stop signal.
    """
    runs, failures = sweep_runs(sweep)
    for failure in failures:
        say(f"left out: {failure}")
    for number, run in enumerate(runs, 1):
        overrides = own_overrides(run.arguments, sweep)
        say(f"\n[{number}/{len(runs)}] {overrides}")
        status, reason = train_run(run, number)
        if status:
            failures.append(Failure(overrides, status, reason))
    return runs, failures


def train_run(run: Run, number: int) -> tuple[int, str]:
    """Train a run in this terminal and return its exit status and last error line.

    Exits with status 75 after a stop signal, which is passed on to the run.
    """
    restarts = {RESTARTS: f"{os.environ.get(RESTARTS, 0)}.{number}"}
    with tempfile.NamedTemporaryFile() as errors, stop_request() as stop:
        # tee shows the errors and keeps a copy. Like the run, it has its own session, so Ctrl-C
        # does not end it.
        with subprocess.Popen(
            ["tee", errors.name], stdin=subprocess.PIPE, stdout=sys.stderr, start_new_session=True
        ) as tee:
            status = train(run, stop, restarts, stderr=tee.stdin)
        if stop:
            sys.exit(REQUEUE)
        return status, killed(status) if status < 0 else last_error(Path(errors.name))
