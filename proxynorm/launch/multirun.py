"""Submit a Hydra multirun as an array of SLURM jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from proxynorm.cli import fail
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.launch.estimate import Estimator, describe, measured_seconds
from proxynorm.launch.runs import Run
from proxynorm.launch.slurm import SlurmOptions
from proxynorm.launch.sweep import launch_array
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import run_name


def sweep_runs(sweep: Sequence[Sequence[str]]) -> list[Run]:
    """A run for each list of overrides, in the folder that train.py gives it.

    Raises ConfigError if two share a folder, or one cannot be built.
    """
    found: dict[Path, Run] = {}
    for overrides in sweep:
        try:
            settings = settings_from(compose_config(overrides))
        except ConfigError as error:
            raise ConfigError(f"{' '.join(overrides)}: {error}") from error
        folder = Path(settings.runs_dir) / run_name(settings)
        if folder in found:
            raise ConfigError(f"two runs of the sweep have the folder {folder}; leave out name=")
        found[folder] = Run(folder, tuple(overrides))
    return list(found.values())


def submit_array(
    runs: Sequence[Run], name: str, options: SlurmOptions, estimator: Callable[[], Estimator]
) -> int:
    """Submit the runs that are due, after printing what they will take; the exit status."""
    log = partial(print, flush=True)
    return launch_array(runs, name, options, log, lambda due: log(describe(due, estimator())))


def launch(sweep: Sequence[Sequence[str]], options: Mapping[str, Any]) -> None:
    """Submit the sweep's runs. options: SlurmOptions' fields."""
    asked = SlurmOptions(**{**options, "sbatch": tuple(options["sbatch"])})
    try:
        runs = sweep_runs(sweep)
        measure = lambda: Estimator(runs, measured_seconds(runs, asked.gpus or 1))  # noqa: E731
        status = submit_array(runs, "proxynorm", asked, measure)
    except ProxynormError as error:
        fail(error)
    if status:
        sys.exit(status)
