"""From Hydra's configuration to settings, with mistakes reported in one line."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.main import get_args_parser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from proxynorm.cli import first_line, nearest, split_list, wrong_type
from proxynorm.errors import ConfigError
from proxynorm.train.arguments import (
    OTHER_CHOICES,
    SEARCH_PATH,
    config_dir_as_key,
    key_advice,
    quote_arguments,
)
from proxynorm.train.settings import DECLARED, Settings, check

# A checkout has configs/ beside the package; a wheel has it inside, by the link proxynorm/configs.
_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE.parent / "configs", _PACKAGE / "configs")
CONFIGS = next(folder for folder in _PLACES if (folder / "train.yaml").is_file())

# ${env_text:WANDB_ENTITY,null} is an environment variable, or the default if that is empty.
# ${env_list:WANDB_TAGS} is an environment variable as a list of texts.
OmegaConf.register_new_resolver(
    "env_text", lambda name, default: os.environ.get(name) or default, replace=True
)
OmegaConf.register_new_resolver(
    "env_list", lambda name: split_list(os.environ.get(name, "")), replace=True
)


def settings_from(config: DictConfig) -> Settings:
    """Return the checked settings of a configuration. Raises ConfigError naming the wrong key."""
    typed = OmegaConf.structured(Settings)
    # Frozen dataclasses become read-only nodes, but merging writes to them.
    for node in (typed, *(typed._get_node(key) for key in typed)):
        OmegaConf.set_readonly(node, False)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{', '.join(missing)} must be given, as {missing[0]}=…")
        values = OmegaConf.to_container(config, resolve=True)
        if isinstance(scales := OmegaConf.select(config, "optim.lr_scale"), DictConfig):
            # YAML reads a part's name such as 1 as a number.
            values["optim"]["lr_scale"] = {str(key): value for key, value in scales.items()}
        settings = OmegaConf.to_object(OmegaConf.merge(typed, values))
    except ConfigKeyError as error:
        key = error.full_key
        advice = key_advice(key, flat_keys(typed), groups())
        raise ConfigError(f"no key '{key}'; {advice}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(wrong_type(error, DECLARED, values)) from error
    given = check(settings).regularization
    # Two regularizers change images, so the data pipeline applies them.
    data = dataclasses.replace(
        settings.data, randaugment=given.randaugment, random_erasing=given.random_erasing
    )
    return dataclasses.replace(settings, data=data)


def compose_config(overrides: Iterable[str]) -> DictConfig:
    """Compose the configuration that the arguments of train.py describe.

    Raises ConfigError with the nearest valid name.
    """
    parsed = parse(overrides)
    options, others, values = groups(search_folders(parsed)), [], []
    for override in parsed:
        if is_group := override.key_or_group in options:
            check_choice(override, options)
        is_plain = override.type == OverrideType.CHANGE and not override.package
        is_key = is_plain and not is_group and not is_hydra_key(override.key_or_group)
        (values if is_key else others).append(override)
    # Composing takes 0.2 s, and a table has hundreds of cells: compose each combination of group
    # choices once, and set the values in a copy, as Hydra does.
    config = copy.deepcopy(_compose(*(item.input_line for item in others)))
    known = flat_keys(config) if values else []
    for override in values:
        key = override.key_or_group
        if key not in known:
            raise ConfigError(f"no key '{key}'; {key_advice(key, known, options)}")
        try:
            OmegaConf.update(config, key, override.value(), merge=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"Error merging override {override.input_line}") from error
    return config


def choices(arguments: Iterable[str]) -> dict[str, str]:
    """Return the option that the arguments of train.py, or their recipe, choose in each group."""
    config = _compose(*hydra_arguments(arguments), return_hydra_config=True)
    return dict(config.hydra.runtime.choices)


@cache
def _compose(*overrides: str, **options: bool) -> DictConfig:
    """Return Hydra's configuration for overrides in its grammar; copy it before changing it."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            return compose("train", list(overrides), **options)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error


def hydra_arguments(arguments: Iterable[str], sweep: bool = False) -> list[str]:
    """Return arguments in Hydra's grammar: --config-dir as a key, text in quotes."""
    return quote_arguments(config_dir_as_key(arguments), groups(), sweep)


def parse(arguments: Iterable[str], sweep: bool = False) -> list[Override]:
    """Parse key=value arguments as Hydra does, but text stays as typed. Raises ConfigError."""
    parser, parsed, arguments = OverridesParser.create(), [], list(arguments)
    for word in hydra_arguments(arguments, sweep):
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            if "=" not in word or word.startswith("-"):
                raise ConfigError(f"'{word}': {dashed_advice(arguments)}") from error
            raise ConfigError(f"{word}: the value cannot be read; put it in quotes") from error
        if override.is_sweep_override() and not sweep:
            raise ConfigError(f"{word}: several values need -m, as in: python train.py -m {word}")
        parsed.append(override)
    return parsed


def dashed_advice(arguments: Sequence[str]) -> str:
    """Return what to write instead of an option with dashes: norm=… instead of --norm ln_pn."""
    for argument in arguments:
        if argument.startswith("-") and argument not in ("-m", "--multirun"):
            word = argument.partition("=")[0].strip("-")
            advice = key_advice(word, flat_keys(compose_config([])), groups())
            if advice.startswith("write "):
                return advice
    return "arguments have the form key=value"


def search_folders(parsed: Iterable[Override]) -> tuple[str, ...]:
    """Return the user's configuration folders, which overrides add to configs/."""
    lists = (override.value() for override in parsed if override.key_or_group == SEARCH_PATH)
    return tuple(str(item).removeprefix("file://") for items in lists for item in items)


@cache
def groups(folders: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return each configuration group with its options, including those in the user's `folders`."""
    found: dict[str, set[str]] = {}
    for folder in (CONFIGS, *map(Path, folders)):
        for path in folder.glob("*/**/*.yaml"):
            group, _, option = path.relative_to(folder).with_suffix("").as_posix().partition("/")
            found.setdefault(group, set()).add(option)
    return {group: sorted(found[group]) for group in sorted(found)}


def check_choice(override: Override, options: Mapping[str, list[str]]) -> None:
    """Raise ConfigError unless the override chooses an option that exists."""
    group, value = override.key_or_group, override.value()
    if group not in options or override.is_delete() or str(value) in options[group]:
        return
    value = "null" if value is None else value
    others = []
    if group == "model":
        import timm  # takes a second; our own models do not need it

        if timm.is_model(str(value)):
            # As if configs/model had a file of this name, with the content of timm.yaml.
            ConfigStore.instance().store(str(value), {"name": str(value)}, group=group)
            return
        others = timm.list_models()
    near = nearest(str(value), options[group], others) + OTHER_CHOICES.get(group, "")
    raise ConfigError(f"{group}={value}: no such {group}; {near}")


def flat_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return the dotted keys of all nodes and leaves."""
    keys = []
    for key in config:
        name, value = f"{prefix}{key}", config._get_node(key)
        keys.append(name)
        if isinstance(value, DictConfig) and not value._is_none():
            keys += flat_keys(value, f"{name}.")
    return keys


def sweep_points(overrides: list[str]) -> list[list[str]]:
    """Return points of a sweep, each a list of plain overrides, that together try every value."""
    values = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in parse(overrides, sweep=True)
    ]
    first = [tried[0] for tried in values]
    points = [first]
    for index, tried in enumerate(values):
        points += [[*first[:index], value, *first[index + 1 :]] for value in tried[1:]]
    return points


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Check the command line of train.py, and return it in Hydra's grammar.

    Raises ConfigError for a mistake, for which Hydra would print a traceback. In a sweep it raises
    only if all runs are wrong: otherwise the wrong ones fail while the others train.
    """

    def refuse(message: str) -> NoReturn:  # instead of argparse's page of usage
        advice = f"{dashed_advice(arguments)}; the options are --help, -m (sweep)"
        raise ConfigError(f"{message}; {advice}, --config-dir=DIR and --cfg job (print)")

    parser = get_args_parser()
    parser.error = refuse
    # Put -m first: Hydra's parser rejects it between two overrides.
    words = sorted(config_dir_as_key(arguments), key=lambda word: word not in ("-m", "--multirun"))
    parsed = parser.parse_args(words)
    if parsed.config_path or parsed.config_name:
        refuse("--config-path and --config-name would replace the configuration")
    words = hydra_arguments(words, parsed.multirun)
    if parsed.help or parsed.hydra_help:
        return words
    overrides = [item for item in parsed.overrides if not is_hydra_key(item) or SEARCH_PATH in item]
    errors, points = [], sweep_points(overrides) if parsed.multirun else [overrides]
    for point in points:
        config = compose_config(point)
        try:
            settings_from(config)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == len(points):
        raise errors[0]
    return words


def is_hydra_key(argument: str) -> bool:
    """Return whether an argument configures Hydra itself, such as its launcher."""
    return argument.lstrip("+~").startswith("hydra")
