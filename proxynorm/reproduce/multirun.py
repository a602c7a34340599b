"""A Hydra multirun as an array of SLURM jobs: the same plan, the same script, the same skipping as a table's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from proxynorm.cli import fail
from proxynorm.config import compose_config, settings_from
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.reproduce.slurm import SlurmOptions
from proxynorm.reproduce.sweep import Entry, launch_array
from proxynorm.train.settings import run_name


def entries(sweep: Sequence[Sequence[str]]) -> list[Entry]:
    """A run for each list of overrides, in the folder that train.py gives it. Raises ConfigError if two share one."""
    found: dict[Path, Entry] = {}
    for overrides in sweep:
        settings = settings_from(compose_config(overrides))
        name, runs_dir = run_name(settings), Path(settings.runs_dir)
        entry = Entry(name, runs_dir / name, runs_dir / "logs" / f"{name}.log", tuple(overrides))
        if entry.folder in found:
            raise ConfigError(f"two runs of the sweep have the folder {entry.folder}; leave out name=")
        found[entry.folder] = entry
    return list(found.values())


def launch(sweep: Sequence[Sequence[str]], options: Mapping[str, Any]) -> None:
    """Submit the sweep's runs; the user's mistakes, and SLURM's refusal, are one line and status 2."""
    try:
        runs = entries(sweep)
        asked = SlurmOptions(**{**options, "sbatch": tuple(options["sbatch"])})
        launch_array(runs, runs[0].folder.parent, "proxynorm", asked, partial(print, flush=True))
    except ProxynormError as error:
        fail(error)
