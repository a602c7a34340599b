"""A table as data: its cells, how each is trained, what they are compared with. Read from tables/NAME.yaml."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from proxynorm.cli import nearest
from proxynorm.errors import ConfigError

TABLES = Path(__file__).resolve().parent / "tables"


@dataclass(frozen=True)
class Cell:
    """One cell: its name, its place on the table's axes, and the overrides that train.py gets for it."""

    name: str
    labels: dict[str, Any]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """A published value of a cell. label: P poster, C code, F caption, D digitised, E elsewhere (not the paper)."""

    cell: str
    value: float
    label: str
    source: str


@dataclass(frozen=True)
class Comparison:
    """Two cells whose difference (first − second) a claim is about; expect: higher, equal or lower."""

    first: str
    second: str
    expect: str
    claim: str


@dataclass(frozen=True)
class Search:
    """The table is a search: of the cells with one value of the axis `by`, the best gives the values of `axes`."""

    axes: tuple[str, ...]
    by: str


@dataclass(frozen=True)
class Tuned:
    """Overrides that come from a finished search: for each cell, the value chosen for its place on the axis `by`."""

    table: str
    by: str


@dataclass(frozen=True)
class Table:
    """A table.

    train:       overrides of every cell
    cells:       blocks, each the product of its axes: {axis: [values]}; a value v of axis a means the override a=v
    bundles:     {axis: {value: [overrides]}} for axes whose values stand for several overrides
    rules:       [{when: {axis: value}, train: [overrides]}] for the cells that match
    tuned:       overrides found by a search
    seeds:       runs a cell
    rows, columns: the axes that go down and across in the report
    metric:      the summary's key that is reported, in percent points
    split:       which images the metric is measured on, in words
    margin:      what a cell may fall behind another, in points, and still match it
    tolerance:   largest distance from a reference, in points, that still is within
    seed_std:    known standard deviation between seeds, in points, and its source in seed_std_source
    file:        the YAML file, of a table that is not one of TABLES
    minutes:     of one run of the first cell on `hardware`, evaluations included: an estimate until runs have been measured,
                 from which those of the other cells follow (reproduce/cost.py)
    hardware:    what the minutes are for; "for N epochs" in it: of a run of so many epochs, not of the recipe's
    """

    name: str
    title: str
    about: str
    train: list[str]
    cells: list[dict[str, list[Any]]]
    rows: list[str]
    seeds: int
    minutes: float
    hardware: str
    columns: list[str] = field(default_factory=list)
    bundles: dict[str, dict[Any, list[str]]] = field(default_factory=dict)
    rules: list[dict[str, Any]] = field(default_factory=list)
    tuned: Tuned | None = None
    search: Search | None = None
    references: list[Reference] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    metric: str = "top1"
    split: str = "the test set"
    margin: float = 0.3
    tolerance: float = 0.5
    seed_std: float | None = None
    seed_std_source: str = ""
    file: str = ""

    @property
    def argument(self) -> str:
        """The word of a command line that names the table: its name, or its file's path as it was given."""
        if not self.file:
            return f"table={self.name}"
        plain = re.fullmatch(r"[\w./~+-]+", self.file)
        return shlex.quote(f"table={self.file if plain else json.dumps(self.file)}")

    def expand(self, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
        """The cells in order. `chosen` is the finished search's {place: {key: value}}; without it the search's
        overrides are left out. Raises ConfigError for a cell the search has nothing for."""
        cells: dict[str, Cell] = {}
        for block in self.cells:
            for values in itertools.product(*block.values()):
                labels = dict(zip(block, values, strict=True))
                cell = Cell(cell_name(labels), labels, tuple(self._overrides(labels, chosen)))
                cells.setdefault(cell.name, cell)
        return list(cells.values())

    def _overrides(
        self, labels: dict[str, Any], chosen: Mapping[str, Mapping[str, Any]] | None
    ) -> Iterator[str]:
        yield from self.train
        for axis, value in labels.items():
            yield from self.bundles[axis][value] if axis in self.bundles else [f"{axis}={value}"]
        for rule in self.rules:
            if all(labels.get(axis) in as_list(wanted) for axis, wanted in rule["when"].items()):
                yield from rule["train"]
        if self.tuned is not None and chosen is not None:
            place = str(labels[self.tuned.by])
            if place not in chosen:
                raise ConfigError(
                    f"table {self.name}: the search {self.tuned.table} has nothing for {place}"
                )
            yield from (f"{key}={value}" for key, value in chosen[place].items())


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def cell_name(labels: Mapping[str, Any]) -> str:
    """The cell's folder name: words as they are, numbers behind the last part of their axis's name."""
    parts = (
        value if isinstance(value, str) else f"{axis.rpartition('.')[2]}{value}"
        for axis, value in labels.items()
    )
    return "-".join(part.replace("/", "_") for part in parts)


def table_names() -> list[str]:
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def load_table(name: str) -> Table:
    """The table of that name, or of that YAML file. Raises ConfigError for an unknown name or a malformed file."""
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no table '{name}' (table=NAME or table=FILE.yaml); {nearest(name, table_names())}"
        )
    try:
        content = yaml.safe_load(path.read_text())
        nested = {"tuned": Tuned, "search": Search}
        listed = {"references": Reference, "comparisons": Comparison}
        if "axis" in content.get("search", {}):  # a search over one axis
            content["search"]["axes"] = (content["search"].pop("axis"),)
        for key in nested.keys() & content.keys():
            content[key] = nested[key](**content[key])
        for key in listed.keys() & content.keys():
            content[key] = [listed[key](**item) for item in content[key]]
        table = Table(name=path.stem, file=name if name.endswith(".yaml") else "", **content)
        check_table(table)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    return table


def check_table(table: Table) -> None:
    """Raises ConfigError for names in the table that name nothing in it."""
    cells = table.expand()
    names = {cell.name for cell in cells}
    axes = {axis for cell in cells for axis in cell.labels}
    for named in [
        *(r.cell for r in table.references),
        *(c.first for c in table.comparisons),
        *(c.second for c in table.comparisons),
    ]:
        if named not in names:
            raise ConfigError(f"table {table.name}: no cell '{named}'; {nearest(named, names)}")
    for axis in [*table.rows, *table.columns]:
        if axis not in axes:
            raise ConfigError(f"table {table.name}: no axis '{axis}'; {nearest(axis, axes)}")
    for comparison in table.comparisons:
        if comparison.expect not in ("higher", "equal", "lower"):
            raise ConfigError(
                f"table {table.name}: expect: {comparison.expect}; valid: higher, equal, lower"
            )


def with_seeds(table: Table, seeds: int | None) -> Table:
    """The table with another number of seeds, if one is given. Raises ConfigError below one."""
    if seeds is None:
        return table
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}: must be at least 1")
    return dataclasses.replace(table, seeds=seeds)
