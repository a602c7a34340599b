"""A Hydra multirun as an array of SLURM jobs: the same plan, the same script, skipping and estimate as a table's."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from proxynorm.cli import fail
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.launch.estimate import SHORT, Estimator, check
from proxynorm.launch.runs import quoted
from proxynorm.launch.slurm import SlurmOptions
from proxynorm.launch.sweep import Entry, launch_array
from proxynorm.launch.throughput import kind
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import run_name

RESULTS = Path("results")  # as scripts/reproduce.py has it


def entries(sweep: Sequence[Sequence[str]]) -> list[Entry]:
    """A run for each list of overrides, in the folder that train.py gives it. Raises ConfigError if two share one, or one
    cannot be built."""
    found: dict[Path, Entry] = {}
    for overrides in sweep:
        try:
            settings = settings_from(compose_config(overrides))
        except ConfigError as error:
            raise ConfigError(f"{' '.join(overrides)}: {error}") from error
        name, runs_dir = run_name(settings), Path(settings.runs_dir)
        entry = Entry(name, runs_dir / name, runs_dir / "logs" / f"{name}.log", tuple(overrides))
        if entry.folder in found:
            raise ConfigError(
                f"two runs of the sweep have the folder {entry.folder}; leave out name="
            )
        found[entry.folder] = entry
    return list(found.values())


def probe_entries(runs: Sequence[Entry]) -> list[Entry]:
    """For each kind of run one of a few steps, in the folder probe/ beside them."""
    kinds = {
        kind(OmegaConf.to_container(compose_config(run.arguments), resolve=True)): run
        for run in runs
    }
    places = [f"runs_dir={quoted(str(run.folder.parent / 'probe'))}" for run in kinds.values()]
    return entries(
        [[*run.arguments, *SHORT, place] for run, place in zip(kinds.values(), places, strict=True)]
    )


def launch(sweep: Sequence[Sequence[str]], options: Mapping[str, Any]) -> None:
    """Submit the sweep's runs; the user's mistakes, what cannot end, and SLURM's refusal, are one line and status 2.

    options: SlurmOptions' fields, force and probe, as scripts/reproduce.py has them.
    """
    try:
        runs, say = entries(sweep), partial(print, flush=True)
        known = {field.name for field in fields(SlurmOptions)} & options.keys()
        asked = SlurmOptions(
            **{**{name: options[name] for name in known}, "sbatch": tuple(options["sbatch"])}
        )
        if options["probe"]:
            probes = probe_entries(runs)
            launch_array(
                probes, probes[0].folder.parent, "proxynorm-probe", replace(asked, wait=True), say
            )

        def estimated(due: Sequence[Entry]) -> None:
            estimate = Estimator(runs[0].folder.parent, RESULTS, processes=asked.gpus or 1)
            check(due, estimate, asked, options["force"], say)

        status = launch_array(runs, runs[0].folder.parent, "proxynorm", asked, say, estimated)
    except ProxynormError as error:
        fail(error)
    if status:
        sys.exit(status)
