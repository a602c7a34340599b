"""The words of a command line: text stays text, and other programs' words lead to our keys."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from proxynorm.cli import nearest, split_list
from proxynorm.errors import ConfigError
from proxynorm.train.settings import CHOICES, Settings, wrong_choice

ARGUMENT = re.compile(r"(?P<key>[+~]*(?P<name>[\w./-]+)(@[\w.:]*)?)=(?P<value>.*)", re.DOTALL)
FUNCTION = re.compile(
    r"(choice|range|interval|glob|shuffle|sort|tag|extend_list|str|int|float|bool|json_str)\("
)

FORM = "arguments have the form key=value"
# What there is besides a group's options.
BESIDES = {
    "model": ", or any other name that timm has",
    "optim": "; optim.name= takes any optimizer of timm's",
    "checkpoint": "; weights=FILE starts from a file",
}
SEARCH = "hydra.searchpath"  # Hydra's key of further configuration folders

# Words of other programs, by the key that they mean here, or by the answer to them.
SYNONYMS = yaml.safe_load(Path(__file__).with_name("synonyms.yaml").read_text())
HOME, NOTES = (
    {word: target for target, words in SYNONYMS[part].items() for word in words.split()}
    for part in ("keys", "answers")
)


@cache
def text_keys() -> dict[str, bool]:
    """Return the dotted keys that hold text (False) or a list of texts (True)."""

    def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
        for name, hint in typing.get_type_hints(kind).items():
            options = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
            options.discard(type(None))
            if dataclasses.is_dataclass(hint):
                yield from fields(hint, f"{prefix}{name}.")
            elif options in ({str}, {list[str]}, {tuple[str, ...]}):
                yield f"{prefix}{name}", options != {str}

    # A model's own arguments have no declared type, but its name is a name.
    return {**dict(fields(Settings)), "model.name": False}


def quoted(text: str) -> str:
    """Quote `text` as one value of Hydra's override grammar, unless it is plainly a word."""
    number_or_null = text.lower() in ("null", "true", "false", "nan", "inf")
    if re.fullmatch(r"\.{0,2}/?[A-Za-z_][\w./-]*", text) and not number_or_null:
        return text
    # In a quoted value, a backslash escapes only before a quote and at the end.
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"


def keep_text(arguments: Iterable[str], groups: Collection[str], sweep: bool = False) -> list[str]:
    """Quote the values of text keys and group choices, which Hydra would read as numbers.

    Its grammar makes 1234561 of name=123456_1, and takes no second = or # in a path. null, what is
    quoted already and Hydra's functions stay as they are. A comma separates values for a group,
    and in a sweep for any key; otherwise it belongs to the text.
    """
    return [_keep(argument, groups, sweep) for argument in arguments]


def _keep(argument: str, groups: Collection[str], sweep: bool) -> str:
    match = ARGUMENT.fullmatch(argument)
    if match is None or not match["value"] or FUNCTION.match(match["value"]):
        return argument
    name, value, is_list = match["name"], match["value"], text_keys().get(match["name"])
    if is_list and value != "null":
        lists = re.split(r"(?<=]),(?=\[)", value) if sweep else [value]
        value = ",".join(map(_list, lists))
    elif name in groups or (is_list is not None and sweep):
        value = value if value.startswith("[") else ",".join(map(_word, split_list(value)))
    elif is_list is not None:
        value = _word(value)
    return f"{match['key']}={value}"


def _list(text: str) -> str:
    """Quote the items of a list; a text without brackets is a list too."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return f"[{','.join(map(_word, split_list(inner)))}]"


def _word(text: str) -> str:
    """Quote a text unless it is null or quoted already."""
    in_quotes = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text if text == "null" or in_quotes else quoted(text)


def search_path(arguments: Iterable[str]) -> list[str]:
    """Replace --config-dir=DIR by the configuration key it stands for. Raises ConfigError.

    As a key it reaches every place that composes the run, SLURM's jobs included.
    """
    rest, folders, words = [], [], iter(arguments)
    for word in words:
        option, separator, value = word.partition("=")
        if option in ("--config-dir", "-cd"):
            folders.append(value if separator else next(words, ""))
        else:
            rest.append(word)
    for folder in folders:
        if not os.path.isdir(folder):
            raise ConfigError(f"--config-dir={folder}: no such folder")
    paths = ",".join(_word(os.path.abspath(folder)) for folder in folders)
    return [*rest, f"{SEARCH}=[{paths}]"] if folders else rest


def key_advice(
    key: str, known: Collection[str], groups: Mapping[str, list[str]], value: str = "…"
) -> str:
    """Return the end of an error message: the key that is meant by `key`, or the nearest ones."""
    parent, _, word = key.replace("-", "_").lower().rpartition(".")
    valid = {*known, *groups}
    if word in NOTES:
        return NOTES[word]
    # momentum=0.9 leaves out the name of the group.
    meant = [HOME.get(word), *(name for name in known if name.endswith(f".{word}"))]
    meant = [key] if key in valid else [name for name in dict.fromkeys(meant) if name in valid]
    if meant and (word != "name" or key in valid):
        near = [name for name in meant if name.rpartition(".")[0] == parent] or meant
        return f"write {' or '.join(written(name, word, value, groups) for name in near)}"
    inside = [name for name in known if name.rpartition(".")[0] == parent]
    return nearest(key, inside if parent and inside else {n for n in valid if "." not in n})


def written(key: str, word: str, value: str, groups: Mapping[str, list[str]]) -> str:
    """Return key=value, or what the key takes if that value is none of its own."""
    if key in CHOICES and value not in map(str.lower, map(str, CHOICES[key])):
        return f"{key}=…, {wrong_choice(key, value)}"
    if key in groups and key != "model" and value != "…" and value not in groups[key]:
        return f"{key}=…, {nearest(value, groups[key])}{BESIDES.get(key, '')}"
    if key not in CHOICES and word in HOME and value.lower() in ("true", "false"):
        value = "…"  # pretrained=true is weights, but not weights=true
    return f"{key}={value}"


def dashed_advice(
    arguments: Sequence[str], known: Collection[str], groups: Mapping[str, list[str]]
) -> str:
    """Return what to write instead of options with dashes: norm=ln_pn for --norm ln_pn."""
    for argument, following in zip(arguments, [*arguments[1:], "-"]):
        option, _, value = argument.partition("=")
        if option.startswith("-") and option not in ("-m", "--multirun"):
            value = value or ("…" if following.startswith("-") else following)
            advice = key_advice(option.strip("-"), known, groups, value)
            is_unknown = advice.startswith(("did you mean", "valid: "))
            return FORM if is_unknown else advice
    return FORM
