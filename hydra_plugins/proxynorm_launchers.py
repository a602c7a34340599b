"""Hydra's launchers for a sweep: python train.py -m norm=bn,ln_pn batch=32,256

hydra/launcher=local (the default) trains one run after the other; hydra/launcher=slurm submits an
array of jobs. Hydra imports this file whenever train.py starts, so slow imports are in functions.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from proxynorm.errors import ConfigError
from proxynorm.launch.slurm import SlurmOptions, launch_array

SLURM = asdict(SlurmOptions())  # the keys hydra.launcher.KEY=…


class LocalLauncher(Launcher):
    """Train the runs of a sweep, each in its own process, then compare them."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, config: DictConfig, **context: Any) -> None:
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from proxynorm.cli import as_installed
        from proxynorm.train.arguments import SEARCH_PATH

        given = config.hydra.overrides
        # Hydra does not pass its own keys, such as the search path, on to the runs.
        self.shared = [word for word in given.hydra if word.startswith(SEARCH_PATH)]
        # Commas do not mark a sweep: logger.tags=[a,b] is none, but seed=range(3) is one.
        overrides = OverridesParser.create().parse_overrides(given.task)
        keys = [override.key_or_group for override in overrides if override.is_sweep_override()]
        self.name = "-".join(["sweep", *(key for key in keys if key != "seed")])
        if config.logger.group is None:
            self.shared.append(f"logger.group={self.name}")
        self.command = f"{as_installed('python train.py -m')} {shlex.join(given.task)}"
        self.folder = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> NoReturn:
        from proxynorm.cli import guard

        guard(lambda: self.run([[*overrides, *self.shared] for overrides in job_overrides]))

    def run(self, sweep: list[list[str]]) -> int:
        """Train and compare the runs.

        Returns 0 if no run failed, 2 if all failures are mistakes of the user, else 1.
        """
        from proxynorm.launch.multirun import train_here
        from proxynorm.launch.runs import is_main, say
        from proxynorm.paper.sweep import write_comparison

        runs, failures = train_here(sweep)
        failed = "\n".join(f"- {failure}" for failure in failures)
        if runs and is_main():
            say(f"\n{write_comparison(runs, self.folder, self.name, self.command, failed)}")
        if not failures:
            return 0
        say(f"\n{len(failures)} of {len(sweep)} runs failed:\n{failed}")
        return 2 if all(failure.status == 2 for failure in failures) else 1


class SlurmLauncher(LocalLauncher):
    """Submit the runs that are neither finished nor queued; compare them once all are finished."""

    def run(self, sweep: list[list[str]]) -> int:
        """Submit and return the exit status. Raises ConfigError for invalid overrides."""
        from proxynorm.launch.multirun import sweep_runs
        from proxynorm.launch.runs import say
        from proxynorm.launch.status import run_status
        from proxynorm.paper.sweep import write_comparison

        runs, failures = sweep_runs(sweep)
        if failures:
            raise ConfigError(str(failures[0]))
        options = SlurmOptions(**{**self.options, "sbatch": list(self.options["sbatch"])})
        status = launch_array(runs, "proxynorm", options)
        if all(run_status(run).state == "done" for run in runs):
            say(write_comparison(runs, self.folder, self.name, self.command))
        return status


for name, launcher, options in (("local", LocalLauncher, {}), ("slurm", SlurmLauncher, SLURM)):
    ConfigStore.instance().store(
        group="hydra/launcher",
        name=name,
        node={"_target_": f"{__name__}.{launcher.__name__}", **options},
        provider="proxynorm",
    )
