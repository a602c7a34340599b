"""The text of `train.py --help`: groups, experiments, and each key with its comment in configs/."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from proxynorm.cli import WIDTH, help_entry
from proxynorm.train.config import CONFIGS, choices, compose_config, groups, parse, search_folders

USAGE = """Train a network with any norm, with or without the proxy-normalized activation.

python train.py [group=option …] [key=value …]

  -m                       sweep: train every combination of a,b,… and compare
  --cfg job                print the configuration and train nothing
  --config-dir=DIR         also take options of groups from DIR/GROUP/*.yaml
  --help                   this text; with group=option, the keys of that option

  python train.py norm=ln_pn batch=32
  python train.py data=folder data.root=DIR model=resnet50 norm=gn_pn
  python train.py -m norm=bn,ln,ln_pn seed=0,1,2
  torchrun --nproc-per-node=8 train.py experiment=NAME data.root=DIR

Groups: group=option, the chosen one in brackets
"""


def help_text(arguments: Sequence[str]) -> str:
    """Return the help for a command line: the groups, and the keys of the options it chooses."""
    values = OmegaConf.to_container(compose_config(arguments), resolve=True)
    chosen, options = choices(arguments), groups(search_folders(parse(arguments)))
    parts = [USAGE]
    for group in sorted(options.keys() - {"experiment"}):
        names = [f"({name})" if name == chosen[group] else name for name in options[group]]
        others = ["or any name that timm has"] if group == "model" else []
        parts.append(help_entry(group, " ".join([*dict.fromkeys(fold(names)), *others])))
    parts.append("\nExperiments: experiment=NAME, a recipe that other keys may still change\n")
    parts += experiments(options["experiment"])
    parts.append("\nKeys: key=value, here with the values in use\n")
    top = {key: value for key, value in values.items() if key not in options}
    parts += keys(top, "", comments([CONFIGS / "train.yaml"]))
    for group in options:
        own = CONFIGS / group / f"{chosen[group]}.yaml"
        if isinstance(values.get(group), dict):
            parts.append(f"\n{textwrap.fill(f'{group}={chosen[group]}: {title(own)}', WIDTH)}\n")
            files = [own, CONFIGS / f"{group}_options.yaml", *sorted(own.parent.glob("*.yaml"))]
            parts += keys(values[group], f"{group}.", comments(files))
    return "".join(parts)


def keys(values: dict[str, Any], prefix: str, explained: dict[str, str]) -> Iterator[str]:
    """Yield an entry for each key, except a group's name, which its title already has."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.", explained)
        elif key != "name" or not prefix:
            shown = "…" if value == "???" else value
            if value is None or isinstance(value, bool):
                shown = json.dumps(value)  # null, true, false, as in YAML
            yield help_entry(f"{prefix}{key}={shown}", explained.get(key, ""))


def comments(files: Iterable[Path]) -> dict[str, str]:
    """Return the comment of each key in YAML files; the first file with a comment wins."""
    found: dict[str, str] = {}
    for path in filter(Path.is_file, files):
        for key, comment in re.findall(r"^ *(\w+):.*?\s# (.*)$", path.read_text(), re.MULTILINE):
            found.setdefault(key, comment)
    return found


def title(path: Path) -> str:
    """Return the first line of a YAML file, a comment that says what the file is."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line[2:] for line in lines if line.startswith("# ") and "@" not in line), "")


def experiments(names: Sequence[str]) -> Iterator[str]:
    """Yield an entry for each family of experiments, with the title of its first member."""
    families: dict[str, str] = {}
    for name, family in zip(names, fold(names), strict=True):
        families.setdefault(family, title(CONFIGS / "experiment" / f"{name}.yaml"))
    column = max(map(len, families)) + 4
    for family, text in families.items():
        several = ", …" if "{" in family else ""
        yield help_entry(family, text.partition(":")[0] + several, column)


def fold(names: Sequence[str]) -> list[str]:
    """Replace three or more names that differ in one number by one like b{0,1,2}."""
    families: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for match in re.finditer(r"\d+", name):
            ends = name[: match.start()], name[match.end() :]
            families.setdefault(ends, []).append(match[0])
    folded = {name: name for name in names}
    for (before, after), numbers in families.items():
        if len(numbers) > 2:
            inner = ",".join(sorted(numbers, key=int))
            folded |= {f"{before}{n}{after}": f"{before}{{{inner}}}{after}" for n in numbers}
    return list(folded.values())
