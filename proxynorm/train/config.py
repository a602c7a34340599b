"""How Hydra's configuration becomes settings; its mistakes become one line."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.main import get_args_parser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from proxynorm.cli import first_line, nearest
from proxynorm.errors import ConfigError
from proxynorm.train.settings import Settings, check

# configs/ is part of an installed package; in a checkout it lies beside it.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(p for p in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if p.is_dir())


def settings_from(config: DictConfig) -> Settings:
    """Return the checked settings of a configuration. Raises ConfigError naming the wrong key."""
    typed = OmegaConf.structured(Settings)
    # The dataclasses are frozen; merging writes into their nodes.
    for node in (typed, *(typed._get_node(key) for key in typed)):
        OmegaConf.set_readonly(node, False)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{', '.join(missing)} must be given, as {missing[0]}=…")
        settings = OmegaConf.to_object(
            OmegaConf.merge(typed, OmegaConf.to_container(config, resolve=True))
        )
    except ConfigKeyError as error:
        key = error.full_key
        raise ConfigError(f"no key '{key}'; {nearest_key(key, flat_keys(typed))}") from error
    except OmegaConfBaseException as error:
        key, words = error.full_key, first_line(error)
        if "is not a ListConfig" in words:
            words = f"must be a list, as {key}=[{OmegaConf.select(config, key)}]"
        raise ConfigError(f"{key}: {words}") from error
    # Two regularizers act on images: the data pipeline applies them.
    given = settings.regularization
    data = dataclasses.replace(
        settings.data, randaugment=given.randaugment, random_erasing=given.random_erasing
    )
    return check(dataclasses.replace(settings, data=data))


def compose_config(overrides: Iterable[str], config_name: str = "train") -> DictConfig:
    """Compose the configuration under `overrides` (Hydra's syntax).

    Raises ConfigError with the nearest valid name.
    """
    parsed = parse(list(overrides))
    choices = [override for override in parsed if is_group(override)]
    for override in choices:
        check_choice(override)
    # Composing takes 0.2 s, and a table has hundreds of cells: compose each combination of group
    # choices once, and set the values in a copy, as Hydra does.
    lines = tuple(override.input_line for override in choices)
    config = copy.deepcopy(_base(config_name, lines))
    values = [override for override in parsed if override not in choices]
    known = flat_keys(config) if values else []
    for override in values:
        check_key(override, known)
    if not all(is_plain(override) for override in values):
        return _compose(config_name, [override.input_line for override in parsed])
    for override in values:
        try:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"Error merging override {override.input_line}") from error
    return config


def _compose(config_name: str, overrides: Iterable[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            return compose(config_name=config_name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error


@cache
def _base(config_name: str, choices: tuple[str, ...]) -> DictConfig:
    """Return the configuration of these group choices alone; callers copy it."""
    return _compose(config_name, choices)


def parse(overrides: list[str]) -> list[Override]:
    """Parse key=value arguments as Hydra does. Raises ConfigError."""
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"{first_line(error)}; arguments have the form key=value") from error


def is_plain(override: Override) -> bool:
    """Return whether the override only sets a key: no sweep, nothing added or deleted."""
    added = (
        override.is_add() or override.is_force_add() or override.key_or_group.startswith("hydra.")
    )
    return not (added or override.is_delete() or override.is_sweep_override() or override.package)


@cache
def groups() -> dict[str, list[str]]:
    """Return each configuration group with its options."""
    folders = [folder for folder in sorted(CONFIGS.iterdir()) if folder.is_dir()]
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def is_group(override: Override) -> bool:
    return override.key_or_group.split("@")[0] in groups()


def check_choice(override: Override) -> None:
    """Raise ConfigError unless the override chooses an option that exists."""
    group, value = override.key_or_group.split("@")[0], override.value()
    options = groups()[group]
    if value is not None and str(value) not in options:
        raise ConfigError(f"{group}={value}: no such {group}; {nearest(str(value), options)}")


def check_key(override: Override, known: list[str]) -> None:
    """Raise ConfigError unless the override changes a known key, or adds one on purpose (+)."""
    key = override.key_or_group
    added = override.is_add() or override.is_force_add() or key.startswith("hydra.")
    if not added and key not in known:
        raise ConfigError(f"no key '{key}'; {nearest_key(key, known)}")


def nearest_key(key: str, known: list[str]) -> str:
    """Return the end of an error message: the nearest key under the same parent, or at the top."""
    parent = key.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == parent]
    top = {name.split(".")[0] for name in known} | set(groups())
    return nearest(key, inside if parent and inside else top)


def flat_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return all keys, dotted, of the nodes and of the leaves."""
    keys = []
    for key in config:
        name, value = f"{prefix}{key}", config._get_node(key)
        keys.append(name)
        if isinstance(value, DictConfig) and not value._is_none():
            keys += flat_keys(value, f"{name}.")
    return keys


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """Return lists of plain overrides that together try each swept value once."""
    values = [
        [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in parse(overrides)
    ]
    first = [choices[0] for choices in values]
    others = [
        [*first[:index], value, *first[index + 1 :]]
        for index, choices in enumerate(values)
        for value in choices[1:]
    ]
    return [first, *others]


def multirun_first(arguments: list[str]) -> list[str]:
    """Move -m to the front, where Hydra's parser takes it whatever comes after."""
    return sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))


def refuse_arguments(message: str) -> NoReturn:
    """Raise ConfigError where argparse would print a page of usage."""
    raise ConfigError(
        f"{message}; give key=value; the options are --help, -m (sweep) and --cfg job (print)"
    )


def check_arguments(arguments: list[str]) -> None:
    """Raise ConfigError for a mistake on the command line, before Hydra prints a traceback."""
    parser = get_args_parser()
    parser.error = refuse_arguments
    parsed = parser.parse_args(arguments)
    if parsed.help or parsed.hydra_help:
        return
    overrides = [item for item in parsed.overrides if not item.lstrip("+~").startswith("hydra")]
    for point in sweep_points(overrides) if parsed.multirun else [overrides]:
        settings_from(compose_config(point))
