"""Hydra's launchers for a sweep: python train.py -m norm=bn,ln_pn batch=32,256

hydra/launcher=local (the default) trains one run after the other; hydra/launcher=slurm submits an
array. Hydra imports this file whenever train.py starts, so slow imports wait until it launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from proxynorm.launch.slurm import SlurmOptions

# hydra.launcher.KEY=…; the keys are those of scripts/reproduce.py launch.
SLURM = {key: value for key, value in asdict(SlurmOptions()).items() if key != "report"}
SLURM["sbatch"] = []


class LocalLauncher(Launcher):
    """Train the sweep's runs, each in a process of its own, and compare them."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, config: DictConfig, **context: Any) -> None:
        """Keep the folders of --config-dir, which Hydra leaves out of a run's own overrides."""
        from proxynorm.train.words import SEARCH

        given = config.hydra.overrides.hydra
        self.folders = [word for word in given if word.startswith(SEARCH)]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list:
        self.start([[*overrides, *self.folders] for overrides in job_overrides])
        return []

    def start(self, sweep: list[list[str]]) -> None:
        from proxynorm.launch.multirun import train_here

        train_here(sweep)


class SlurmLauncher(LocalLauncher):
    """Submit the sweep's runs that are neither finished nor queued, without waiting for them."""

    def start(self, sweep: list[list[str]]) -> None:
        from proxynorm.launch.multirun import submit

        submit(sweep, self.options)


for name, launcher, options in (("local", LocalLauncher, {}), ("slurm", SlurmLauncher, SLURM)):
    ConfigStore.instance().store(
        group="hydra/launcher",
        name=name,
        node={"_target_": f"{__name__}.{launcher.__name__}", **options},
        provider="proxynorm",
    )
