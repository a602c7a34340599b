"""Whether finished runs were trained as their table says: a report's figures belong to the commands below them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from proxynorm.errors import ConfigError, ProxynormError
from proxynorm.launch.estimate import planned_settings
from proxynorm.launch.runs import Run, check_folder, read_summary
from proxynorm.paper.records import FAILURE, archive_path, read_archive
from proxynorm.train.config import settings_from
from proxynorm.train.run import differences, shown
from proxynorm.train.settings import Settings, identity


class Mismatch(NamedTuple):
    """A finished run, in its folder or kept at `place`, and the first key in which it is not what its table says."""

    run: Run
    place: Path
    key: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"trained with {self.key}={self.was}, the table says {self.now}"


def refuse_other_recipes(
    runs: Sequence[Run], results: str | Path, overrides: Sequence[str] = ()
) -> None:
    """Raises ConfigError naming the first finished run that is not what the table and the `overrides` say, and what to
    do: give train= what all finished runs have, or, where there are others, move these away."""
    finished, others = other_recipes(runs, results, overrides)
    if not others:
        return
    first = others[0]
    remedy = f"remove {first.place}"
    if len(others) == finished and len({(other.key, other.was) for other in others}) == 1:
        remedy += f", or give train=[{first.key}={first.was}]"
    elif len(others) > 1:
        remedy = f"move these away: {', '.join(str(other.place) for other in others)}"
    raise ConfigError(f"{first.run.name} was {first}; {remedy}")


def other_recipes(
    runs: Sequence[Run], results: str | Path, overrides: Sequence[str] = ()
) -> tuple[int, list[Mismatch]]:
    """How many runs are finished, and those of them that are not what the table and the `overrides` say. The
    configuration is composed once a cell. Raises DataError and ConfigError for damaged files."""
    recipes: dict[str, dict[str, Any]] = {}
    finished, others = 0, []
    for run in runs:
        place, config = finished_config(run, results)
        if config is None:
            continue
        finished += 1
        if run.cell.name not in recipes:
            recipes[run.cell.name] = recipe(planned_settings([*run.arguments(), *overrides]))
        said, trained = {**recipes[run.cell.name], "seed": run.seed}, stored_recipe(config, place)
        if differences(trained, said):
            key = next(
                key
                for key in sorted(trained.keys() | said.keys())
                if trained.get(key) != said.get(key)
            )
            others.append(Mismatch(run, place, key, shown(trained.get(key)), shown(said.get(key))))
    return finished, others


def finished_config(run: Run, results: str | Path) -> tuple[Path, bytes | None]:
    """Where the run's figures come from, and the config.yaml there; None if it did not finish. Raises DataError."""
    if read_summary(run.folder) is not None:
        check_folder(run.folder)
        return run.folder, (run.folder / "config.yaml").read_bytes()
    archive = archive_path(run, results)
    files = read_archive(archive) if archive.exists() else {}
    return archive, None if FAILURE in files else files.get("config.yaml")


def recipe(settings: Settings) -> dict[str, Any]:
    """What decides what is trained, and where it ends."""
    return {**identity(settings), "max_steps": settings.max_steps}


def stored_recipe(config: bytes, place: Path) -> dict[str, Any]:
    """That of a run's config.yaml; keys that did not exist yet have their defaults. Raises ConfigError."""
    try:
        return recipe(settings_from(OmegaConf.create(yaml.safe_load(config))))
    except (ProxynormError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{place}: config.yaml is damaged ({error}); remove it, and run again"
        ) from error
