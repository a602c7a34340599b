"""Arguments of train.py: text stays as typed, and other programs' words lead to our keys."""

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

# What a group takes besides its options: the end of an error message.
OTHER_CHOICES = {
    "model": ", or any other name that timm has",
    "optim": "; optim.name= takes any optimizer of timm's",
    "checkpoint": "; weights=FILE starts from a file",
    "experiment": "; for none, leave it out",
}
SEARCH_PATH = "hydra.searchpath"  # Hydra's key for further configuration folders

SYNONYMS = yaml.safe_load(Path(__file__).with_name("synonyms.yaml").read_text())
# A word of another program → our key, or the answer to it if there is no such key.
KEY_OF, ANSWERS = (
    {word: target for target, words in SYNONYMS[part].items() for word in words.split()}
    for part in ("keys", "answers")
)
# A key with choices stays unquoted, so that Hydra sees several values, which need -m.
TYPES = {
    key: item.type.removesuffix(" | None")
    for key, item in DECLARED.items()
    if "choices" not in item.metadata
}
TEXT_KEYS = {key for key, kind in TYPES.items() if kind == "str"}
TEXT_KEYS.add("model.name")  # a model's own arguments have no declared type
TEXT_LISTS = {key for key, kind in TYPES.items() if kind == "list[str]"}


def quoted(text: str) -> str:
    """Quote `text` for Hydra's override grammar, unless Hydra reads it as one string anyway."""
    is_literal = text.lower() in ("null", "true", "false", "nan", "inf")
    if re.fullmatch(r"\.{0,2}/?[A-Za-z_][\w./-]*", text) and not is_literal:
        return text
    # In a quoted value, a backslash escapes only before a quote and at the end.
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"


def quote_arguments(
    arguments: Iterable[str], groups: Collection[str], sweep: bool = False
) -> list[str]:
    """Quote the values of text keys and group choices, which Hydra might otherwise misread.

    Hydra reads name=123456_1 as the number 1234561, and refuses a second = or a # in a path. null,
    quoted text and Hydra's functions stay as they are. A comma separates the values of a group, and
    in a sweep those of any key; otherwise it is part of the text.
    """

    def quote(argument: str) -> str:
        match = ARGUMENT.fullmatch(argument)
        if match is None or match["value"] in ("", "null") or FUNCTION.match(match["value"]):
            return argument
        name, value = match["name"], match["value"]
        if name in TEXT_LISTS:
            lists = re.split(r"(?<=]),(?=\[)", value) if sweep else [value]
            value = ",".join(f"[{quoted_items(items)}]" for items in lists)
        elif name in groups or (sweep and name in TEXT_KEYS):
            value = value if value.startswith("[") else quoted_items(value)
        elif name in TEXT_KEYS:
            value = quoted_once(value)
        return f"{match['key']}={value}"

    return [quote(argument) for argument in arguments]


def quoted_once(text: str) -> str:
    """Quote a text unless it is null or quoted already."""
    return text if text == "null" or in_quotes(text) else quoted(text)


def quoted_items(text: str) -> str:
    """Quote each text of a list, which may have brackets around it."""
    return ",".join(map(quoted_once, split_list(text)))


def config_dir_as_key(arguments: Iterable[str]) -> list[str]:
    """Replace --config-dir=DIR by Hydra's key for it. Raises ConfigError if DIR does not exist.

    A key is passed on with the other overrides of a run, for example to SLURM's jobs.
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
    return [*rest, f"{SEARCH_PATH}=[{paths}]"] if folders else rest


def key_advice(key: str, known: Collection[str], groups: Collection[str]) -> str:
    """Return the end of an error message: the key that was meant by `key`, or the nearest ones."""
    parent, _, word = key.replace("-", "_").lower().rpartition(".")
    if word in ANSWERS:
        return ANSWERS[word]
    valid = {*known, *groups}
    if key in valid:  # it was given with dashes, as in --norm ln_pn
        return f"write {key}=…"

    if key in DECLARED:  # the chosen option's file lacks it, as optim=sgd lacks optim.eps
        return f"write +{key}=… if the chosen {parent} uses it"

    # momentum=0.9 lacks its group. Every group has a key called name.
    in_groups = [name for name in known if name.endswith(f".{word}") and word != "name"]
    meant = [name for name in dict.fromkeys([KEY_OF.get(word), *in_groups]) if name in valid]
    if meant:
        return f"write {' or '.join(f'{name}=…' for name in keys_in(parent, meant) or meant)}"
    return nearest(key, keys_in(parent, valid) or keys_in("", valid))


def keys_in(group: str, keys: Iterable[str]) -> list[str]:
    """Return the keys that lie directly in a group, or at the top for ""."""
    return [key for key in keys if key.rpartition(".")[0] == group]
