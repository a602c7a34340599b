"""Hydra's launcher for SLURM: python train.py -m norm=bn,ln_pn batch=32,256 hydra/launcher=slurm

Hydra imports this file whenever train.py starts, so slow imports wait until it launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher

from proxynorm.launch.slurm import SlurmOptions

# hydra.launcher.KEY=…; the keys are those of scripts/reproduce.py launch.
KEYS = {key: value for key, value in asdict(SlurmOptions()).items() if key != "report"}
CONFIG = {"_target_": "hydra_plugins.slurm_launcher.SlurmLauncher", **KEYS, "sbatch": []}


class SlurmLauncher(Launcher):
    """Submit the sweep's runs that are neither finished nor queued, without waiting for them."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, **context: Any) -> None:
        """Need nothing of Hydra's: each job is a command line of train.py."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list:
        from proxynorm.launch.multirun import launch

        launch([list(overrides) for overrides in job_overrides], self.options)
        return []


ConfigStore.instance().store(
    group="hydra/launcher", name="slurm", node=CONFIG, provider="proxynorm"
)
