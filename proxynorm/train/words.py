"""The words of a command line: text stays text, and other programs' words lead to our keys."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import yaml

from proxynorm.cli import in_quotes, nearest, split_list
from proxynorm.errors import ConfigError
from proxynorm.train.settings import DECLARED

ARGUMENT = re.compile(r"(?P<key>[+~]*(?P<name>[\w./-]+)(@[\w.:]*)?)=(?P<value>.*)", re.DOTALL)
FUNCTION = re.compile(
    r"(choice|range|interval|glob|shuffle|sort|tag|extend_list|str|int|float|bool|json_str)\("
)

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
# The keys that hold text (False) or a list of texts (True).
TEXT_KEYS = {
    key: item.type.startswith("list")
    for key, item in DECLARED.items()
    if item.type.removesuffix(" | None") in ("str", "list[str]")
}
TEXT_KEYS["model.name"] = False  # a model's own arguments have no declared type


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

    def kept(argument: str) -> str:
        match = ARGUMENT.fullmatch(argument)
        if match is None or not match["value"] or FUNCTION.match(match["value"]):
            return argument
        name, value, is_list = match["name"], match["value"], TEXT_KEYS.get(match["name"])
        if is_list and value != "null":
            lists = re.split(r"(?<=]),(?=\[)", value) if sweep else [value]
            value = ",".join(f"[{quoted_items(items)}]" for items in lists)
        elif name in groups or (is_list is not None and sweep):
            value = value if value.startswith("[") else quoted_items(value)
        elif is_list is not None:
            value = typed(value)
        return f"{match['key']}={value}"

    return [kept(argument) for argument in arguments]


def typed(text: str) -> str:
    """Quote a text of the command line unless it is null or quoted already."""
    return text if text == "null" or in_quotes(text) else quoted(text)


def quoted_items(text: str) -> str:
    """Quote each item of a list of texts, written with or without brackets."""
    return ",".join(map(typed, split_list(text)))


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
    paths = ",".join(quoted(os.path.abspath(folder)) for folder in folders)
    return [*rest, f"{SEARCH}=[{paths}]"] if folders else rest


def key_advice(key: str, known: Collection[str], groups: Collection[str]) -> str:
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
        return f"write {' or '.join(f'{name}=…' for name in near)}"
    inside = [name for name in known if name.rpartition(".")[0] == parent]
    return nearest(key, inside if parent and inside else {n for n in valid if "." not in n})
