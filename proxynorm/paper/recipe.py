"""Check that finished runs were trained with the recipe that their table states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from proxynorm.errors import ConfigError
from proxynorm.launch.finished import reading
from proxynorm.paper.records import read_record
from proxynorm.paper.table import TableRun
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import identity


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

    @cache  # composing is slow; a cell's seeds share it
    def stated(arguments: Sequence[str]) -> dict[str, Any]:
        config = compose_config(arguments)
        if OmegaConf.is_missing(config.data, "root"):
            config.data.root = None
        return recipe(config)

    others = []
    for run in runs:
        record = read_record(run, results)
        if record is None or record.failure:
            continue
        now = {**stated(run.kind), "seed": run.seed}
        with reading(record.place):  # keys that an old file lacks have defaults
            was = recipe(OmegaConf.create(yaml.safe_load(record.files["config.yaml"])))
        differing = (k for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k))
        if key := next(differing, None):
            others.append(Mismatch(run, record.place, key, was.get(key), now.get(key)))
    return others


def recipe(config: DictConfig) -> dict[str, Any]:
    """The keys that decide the training."""
    settings = settings_from(config)
    return {**identity(settings), "max_steps": settings.max_steps}
