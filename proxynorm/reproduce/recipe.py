"""Whether finished runs were trained as their table says: a report's figures belong to the commands below them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from proxynorm.config import settings_from
from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.reproduce.estimate import planned_settings
from proxynorm.reproduce.records import FAILURE, archive_path, read_archive
from proxynorm.reproduce.runs import Run, read_summary
from proxynorm.train.run import differences, shown
from proxynorm.train.settings import Settings, identity


def refuse_other_recipes(runs: Sequence[Run], results: str | Path, overrides: Sequence[str] = ()) -> None:
    """Raises ConfigError naming the first finished run, in its folder or kept, and the first key in which it is not what
    the table and the `overrides` say. The configuration is composed once a cell."""
    recipes: dict[str, dict[str, Any]] = {}
    for run in runs:
        place, config = finished_config(run, results)
        if config is None:
            continue
        if run.cell.name not in recipes:
            recipes[run.cell.name] = recipe(planned_settings([*run.arguments(), *overrides]))
        said, trained = {**recipes[run.cell.name], "seed": run.seed}, stored_recipe(config, place)
        if differences(trained, said):
            key = next(key for key in sorted(trained.keys() | said.keys()) if trained.get(key) != said.get(key))
            was, now = shown(trained.get(key)), shown(said.get(key))
            raise ConfigError(
                f"{run.name} was trained with {key}={was}, the table says {now}; remove {place}, or give train=[{key}={was}]"
            )


def finished_config(run: Run, results: str | Path) -> tuple[Path, bytes | None]:
    """Where the run's figures come from, and the config.yaml there; None if it did not finish, or has none. Raises
    DataError."""
    if read_summary(run.folder) is not None:
        path = run.folder / "config.yaml"
        return run.folder, path.read_bytes() if path.is_file() else None
    archive = archive_path(run, results)
    files = read_archive(archive) if archive.is_file() else {}
    return archive, None if FAILURE in files else files.get("config.yaml")


def recipe(settings: Settings) -> dict[str, Any]:
    """What decides what is trained, and where it ends."""
    return {**identity(settings), "max_steps": settings.max_steps}


def stored_recipe(config: bytes, place: Path) -> dict[str, Any]:
    """That of a run's config.yaml; keys that did not exist yet have their defaults. Raises ConfigError."""
    try:
        return recipe(settings_from(OmegaConf.create(yaml.safe_load(config))))
    except (ProxynormError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{place}: config.yaml is damaged ({error}); remove it, and run again") from error
