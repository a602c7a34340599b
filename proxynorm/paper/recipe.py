"""Check that finished runs were trained with the recipe that their table states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.launch.finished import finished_files
from proxynorm.paper.records import FAILURE, archive_path, read_archive
from proxynorm.paper.table import TableRun


class Mismatch(NamedTuple):
    """A finished run, where it lies, and the first key in which it differs from its table."""

    run: TableRun
    place: Path
    key: str
    trained: Any
    stated: Any

    def __str__(self) -> str:
        return f"trained with {self.key}={self.trained}, the table says {self.stated}"


def refuse_other_recipes(runs: Sequence[TableRun], results: str | Path) -> None:
    """Raises ConfigError naming the finished runs of another recipe, and the remedy."""
    if others := other_recipes(runs, results):
        first, places = others[0], ", ".join(str(other.place) for other in others)
        remedy = f"remove {places}, or state their recipe, as train=[{first.key}={first.trained}]"
        raise ConfigError(f"{first.run.name} was {first}; {remedy}")


def other_recipes(runs: Sequence[TableRun], results: str | Path) -> list[Mismatch]:
    """The finished runs whose recipe differs from the table's. Raises DataError, ConfigError."""
    stated = cache(stated_recipe)  # composing is slow; a cell's seeds share it
    others = []
    for run in runs:
        place, files = run.folder, finished_files(run.folder)
        if files is None and (archive := archive_path(run, results)).exists():
            place, files = archive, read_archive(archive)
        if files is None or FAILURE in files:
            continue
        now = {**stated(run.kind), "seed": run.seed}
        was = stored_recipe(files["config.yaml"], place)
        differing = (k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k))
        if key := next(differing, None):
            others.append(Mismatch(run, place, key, was.get(key), now.get(key)))
    return others


def recipe(config: DictConfig) -> dict[str, Any]:
    """The keys that decide the training."""
    from proxynorm.train.config import settings_from
    from proxynorm.train.settings import identity

    settings = settings_from(config)
    return {**identity(settings), "max_steps": settings.max_steps}


def stated_recipe(arguments: Sequence[str]) -> dict[str, Any]:
    """The recipe of a run's arguments."""
    from proxynorm.train.config import compose_config

    config = compose_config(arguments)
    if OmegaConf.is_missing(config.data, "root"):
        config.data.root = None
    return recipe(config)


def stored_recipe(config: bytes, place: Path) -> dict[str, Any]:
    """The recipe of a config.yaml; keys that an old one lacks have defaults. Raises ConfigError."""
    try:
        return recipe(OmegaConf.create(yaml.safe_load(config)))
    except (ProxynormError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{place}: config.yaml is damaged ({error}); remove it") from error
