"""How Hydra's configuration becomes settings; its mistakes become one line."""

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

from proxynorm.cli import first_line, nearest, split_list
from proxynorm.errors import ConfigError
from proxynorm.train.settings import Settings, check
from proxynorm.train.words import BESIDES, SEARCH, keep_text, key_advice, search_path

# A checkout has configs/ beside the package; a wheel has it inside, by the link proxynorm/configs.
_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE.parent / "configs", _PACKAGE / "configs")
CONFIGS = next(folder for folder in _PLACES if (folder / "train.yaml").is_file())

# ${env_list:WANDB_TAGS}: a variable of the environment as a list of texts.
OmegaConf.register_new_resolver(
    "env_list", lambda name: split_list(os.environ.get(name, "")), replace=True
)


def settings_from(config: DictConfig) -> Settings:
    """Return the checked settings of a configuration. Raises ConfigError naming the wrong key."""
    typed = OmegaConf.structured(Settings)
    # The dataclasses are frozen; merging writes into their nodes.
    for node in (typed, *(typed._get_node(key) for key in typed)):
        OmegaConf.set_readonly(node, False)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{', '.join(missing)} must be given, as {missing[0]}=…")
        values = OmegaConf.to_container(config, resolve=True)
        if isinstance(scales := OmegaConf.select(config, "optim.lr_scale"), DictConfig):
            # YAML makes a number of a part's name such as 1.
            values["optim"]["lr_scale"] = {str(key): value for key, value in scales.items()}
        settings = OmegaConf.to_object(OmegaConf.merge(typed, values))
    except ConfigKeyError as error:
        key = error.full_key
        advice = key_advice(key, flat_keys(typed), groups())
        raise ConfigError(f"no key '{key}'; {advice}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    # Two regularizers act on images: the data pipeline applies them.
    given = settings.regularization
    data = dataclasses.replace(
        settings.data, randaugment=given.randaugment, random_erasing=given.random_erasing
    )
    return check(dataclasses.replace(settings, data=data))


def compose_config(overrides: Iterable[str]) -> DictConfig:
    """Compose the configuration under `overrides`: the arguments of train.py.

    Raises ConfigError with the nearest valid name.
    """
    parsed = parse(overrides)
    options, others, values = groups(search_folders(parsed)), [], []
    for override in parsed:
        if is_group := group_of(override) in options:
            check_choice(override, options)
        is_plain = override.type == OverrideType.CHANGE and not override.package
        is_key = is_plain and not is_group and not is_hydras(override.key_or_group)
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
    """Return the option of each group that the arguments of train.py, and their recipe, choose."""
    config = _compose(*hydra_words(arguments), return_hydra_config=True)
    return dict(config.hydra.runtime.choices)


@cache
def _compose(*words: str, **options: bool) -> DictConfig:
    """Return Hydra's configuration under words of its grammar; callers copy it."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            return compose("train", list(words), **options)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error


def hydra_words(arguments: Iterable[str], sweep: bool = False) -> list[str]:
    """Return arguments in Hydra's grammar: --config-dir as a key, text in quotes."""
    return keep_text(search_path(arguments), groups(), sweep)


def parse(arguments: Iterable[str], sweep: bool = False) -> list[Override]:
    """Parse key=value arguments as Hydra does, text as it was typed. Raises ConfigError."""
    parser, parsed, arguments = OverridesParser.create(), [], list(arguments)
    for word in hydra_words(arguments, sweep):
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
    """Return what to write instead of an option with dashes: norm=… for --norm ln_pn."""
    for argument in arguments:
        if argument.startswith("-") and argument not in ("-m", "--multirun"):
            word = argument.partition("=")[0].strip("-")
            advice = key_advice(word, flat_keys(compose_config([])), groups())
            if advice.startswith("write "):
                return advice
    return "arguments have the form key=value"


def search_folders(parsed: Iterable[Override]) -> tuple[str, ...]:
    """Return the folders, besides configs/, in which the overrides let Hydra look for options."""
    lists = (override.value() for override in parsed if override.key_or_group == SEARCH)
    return tuple(str(item).removeprefix("file://") for items in lists for item in items)


@cache
def groups(folders: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return each configuration group with its options, those in the user's `folders` included."""
    found: dict[str, set[str]] = {}
    for folder in (CONFIGS, *map(Path, folders)):
        for path in folder.glob("*/**/*.yaml"):
            group, _, option = path.relative_to(folder).with_suffix("").as_posix().partition("/")
            found.setdefault(group, set()).add(option)
    return {group: sorted(found[group]) for group in sorted(found)}


def group_of(override: Override) -> str:
    return override.key_or_group.split("@")[0]


def check_choice(override: Override, options: Mapping[str, list[str]]) -> None:
    """Raise ConfigError unless the override chooses an option that exists."""
    group, value = group_of(override), override.value()
    if group not in options or value is None or str(value) in options[group]:
        return
    others = []
    if group == "model":
        import timm  # a second, which names of our own do not wait for

        if timm.is_model(str(value)):
            # As if configs/model had a file of this name, which says no more than timm.yaml.
            ConfigStore.instance().store(str(value), {"name": str(value)}, group=group)
            return
        others = timm.list_models()
    near = nearest(str(value), options[group], others) + BESIDES.get(group, "")
    raise ConfigError(f"{group}={value}: no such {group}; {near}")


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
        for override in parse(overrides, sweep=True)
    ]
    first = [tried[0] for tried in values]
    points = [first]
    for index, tried in enumerate(values):
        points += [[*first[:index], value, *first[index + 1 :]] for value in tried[1:]]
    return points


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """Check the command line of train.py, and return it as Hydra is to read it.

    Raises ConfigError for a mistake, before Hydra prints a traceback. In a sweep, a value that is
    wrong alone is left to its run, which fails while the others go on.
    """

    def refuse(message: str) -> NoReturn:  # argparse would print a page of usage
        advice = f"{dashed_advice(arguments)}; the options are --help, -m (sweep)"
        raise ConfigError(f"{message}; {advice}, --config-dir=DIR and --cfg job (print)")

    parser = get_args_parser()
    parser.error = refuse
    # Hydra's parser takes -m at the front, whatever comes after.
    words = sorted(search_path(arguments), key=lambda word: word not in ("-m", "--multirun"))
    parsed = parser.parse_args(words)
    if parsed.config_path or parsed.config_name:
        refuse("--config-path and --config-name would replace the configuration")
    words = hydra_words(words, parsed.multirun)
    if parsed.help or parsed.hydra_help:
        return words
    overrides = [item for item in parsed.overrides if not is_hydras(item) or SEARCH in item]
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


def is_hydras(argument: str) -> bool:
    """Return whether an argument is about Hydra itself, such as the launcher."""
    return argument.lstrip("+~").startswith("hydra")
