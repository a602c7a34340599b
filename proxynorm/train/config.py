"""The one place where the Hydra configuration becomes settings, and where its mistakes become one line."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

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

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def groups() -> dict[str, list[str]]:
    """Each configuration group with its options."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(CONFIGS.iterdir())
        if folder.is_dir()
    }


def compose_config(overrides: Iterable[str], config_name: str = "train") -> DictConfig:
    """The configuration under `overrides` (Hydra's syntax). Raises ConfigError with the nearest valid name."""
    parsed = parse(list(overrides))
    choices = [override for override in parsed if is_group(override)]
    for override in choices:
        check_choice(override)
    base = copy.deepcopy(_base(config_name, tuple(override.input_line for override in choices)))
    values = [override for override in parsed if override not in choices]
    known = flat_keys(base) if values else []
    for override in values:
        check_key(override, known)
    if not all(is_plain(override) for override in values):
        return _compose(config_name, [override.input_line for override in parsed])
    for override in values:  # as Hydra does, which takes half a second to come here again
        try:
            OmegaConf.update(base, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"Error merging override {override.input_line}") from error
    return base


def parse(overrides: list[str]) -> list[Override]:
    """Hydra's parse of key=value arguments. Raises ConfigError."""
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"{first_line(error)}; arguments have the form key=value") from error


@lru_cache(maxsize=64)
def _base(config_name: str, choices: tuple[str, ...]) -> DictConfig:
    """The configuration of these groups alone; not to be changed."""
    return _compose(config_name, list(choices))


def is_plain(override: Override) -> bool:
    """Whether `override` only gives a key of the configuration another value: no sweep, and nothing added or taken away."""
    other = (
        override.is_add()
        or override.is_force_add()
        or override.is_delete()
        or override.is_sweep_override()
    )
    return not other and override.package is None and not override.key_or_group.startswith("hydra.")


def is_group(override: Override) -> bool:
    return override.key_or_group.split("@")[0] in groups()


def check_choice(override: Override) -> None:
    group, value = override.key_or_group.split("@")[0], override.value()
    if value is not None and str(value) not in groups()[group]:
        raise ConfigError(
            f"{group}={value}: no such {group}; {nearest(str(value), groups()[group])}"
        )


def check_key(override: Override, known: list[str]) -> None:
    """Raises ConfigError unless `override` changes one of the configuration's `known` keys, or adds one on purpose (+)."""
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or key.startswith("hydra."):
        return
    if key in known or any(name.startswith(f"{key}.") for name in known):
        return
    raise ConfigError(f"no key '{key}'; {nearest(key, siblings(key, known))}")


def siblings(key: str, known: list[str]) -> list[str]:
    """The keys one may have meant: those under the same parent if it exists, else the top level, groups included."""
    parent = key.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == parent]
    if parent and inside:
        return inside
    return sorted({name.split(".")[0] for name in known} | set(groups()))


def flat_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """All keys down to the leaves, dotted."""
    keys = []
    for key in config:
        name, value = f"{prefix}{key}", config._get_node(key)
        keys.append(name)
        if isinstance(value, DictConfig) and not value._is_none():
            keys += flat_keys(value, f"{name}.")
    return keys


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            return compose(config_name=config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error


def to_dataclass(config: DictConfig, schema: type) -> Any:
    """An instance of the dataclass `schema` holding `config`'s values. Raises ConfigError naming a wrong key or value."""
    typed = OmegaConf.structured(schema)
    for key in typed:
        node = typed._get_node(key)
        if isinstance(node, DictConfig):
            OmegaConf.set_readonly(node, False)
    OmegaConf.set_readonly(typed, False)
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{', '.join(missing)} must be given, as {missing[0]}=…")
        merged = OmegaConf.merge(typed, OmegaConf.to_container(config, resolve=True))
        check_flags(config, merged)
        return OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        key = error.full_key
        raise ConfigError(
            f"no key '{key}'; {nearest(key, siblings(key, flat_keys(typed)))}"
        ) from error
    except OmegaConfBaseException as error:
        key, words = error.full_key, first_line(error)
        if "is not a ListConfig" in words:
            words = f"must be a list, as {key}=[{OmegaConf.select(config, key)}]"
        raise ConfigError(f"{key}: {words}") from error


def check_flags(config: DictConfig, typed: DictConfig) -> None:
    """Raises ConfigError where a number other than 0 and 1 is given for true or false, which OmegaConf takes."""
    for key in flat_keys(config):
        value = OmegaConf.select(config, key)
        if (
            isinstance(value, int)
            and value not in (0, 1)
            and isinstance(OmegaConf.select(typed, key), bool)
        ):
            raise ConfigError(f"{key}={value}: must be true or false")


def settings_from(config: DictConfig) -> Settings:
    """The checked settings of a training configuration. Raises ConfigError."""
    settings = to_dataclass(config, Settings)
    regularization = settings.regularization
    images = {
        "randaugment": regularization.randaugment,
        "random_erasing": regularization.random_erasing,
    }
    return check(dataclasses.replace(settings, data=dataclasses.replace(settings.data, **images)))


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """For a multirun's overrides: lists of plain overrides that try each swept value once."""
    parsed = parse(overrides)
    swept = {
        index: [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()]
        for index, o in enumerate(parsed)
        if o.is_sweep_override()
    }
    first = [
        swept[index][0] if index in swept else override.input_line
        for index, override in enumerate(parsed)
    ]
    points = [first]
    for index, values in swept.items():
        points += [[*first[:index], value, *first[index + 1 :]] for value in values[1:]]
    return points


def multirun_first(arguments: list[str]) -> list[str]:
    """The arguments with -m before the others, where Hydra's parser takes it whatever comes after."""
    return sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))


def refuse_arguments(message: str) -> NoReturn:
    """In place of argparse's own, which adds a page of usage. Raises ConfigError."""
    raise ConfigError(
        f"{message}; give key=value; the options are --help, -m (sweep) and --cfg job (print)"
    )


def check_arguments(arguments: list[str]) -> None:
    """Compose and convert what the command line asks for, so that its mistakes show in one line before Hydra starts.

    Raises ConfigError.
    """
    parser = get_args_parser()
    parser.error = refuse_arguments
    parsed = parser.parse_args(arguments)
    if parsed.help or parsed.hydra_help:
        return
    overrides = [item for item in parsed.overrides if not item.lstrip("+~").startswith("hydra")]
    for point in sweep_points(overrides) if parsed.multirun else [overrides]:
        settings_from(compose_config(point))
