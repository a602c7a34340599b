"""A table as data, read from tables/NAME.yaml: its cells, how each is trained, its comparisons."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from proxynorm.cli import nearest
from proxynorm.errors import ConfigError
from proxynorm.launch.runs import Estimate, Run
from proxynorm.train.arguments import quoted

TABLES = Path(__file__).resolve().parent / "tables"
# A link to results/. A wheel contains only its chosen.json files.
SHIPPED = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Cell:
    """A cell: its name, its value on each axis (labels), its overrides for train.py."""

    name: str
    labels: dict[str, Any]
    overrides: tuple[str, ...]

    @property
    def norm(self) -> str:
        """The name of its norm; "" if the table has no axis norm."""
        return str(self.labels.get("norm", ""))


@dataclass(frozen=True)
class TableRun(Run):
    """A run of a table: one cell, one seed."""

    table: str
    cell: Cell
    seed: int


@dataclass(frozen=True)
class Reference:
    """A published value of a cell. label: a key of report.LABELS, the kind of source."""

    cell: str
    value: float
    label: str
    source: str


@dataclass(frozen=True)
class Comparison:
    """A claim about two cells. expect: the first is higher, lower or equal (matches or exceeds)."""

    first: str
    second: str
    expect: str
    claim: str


@dataclass(frozen=True)
class Search:
    """A search for the best values on `axes`, for each value of the axis `by`."""

    axes: list[str]
    by: str


@dataclass(frozen=True)
class Tuned:
    """The search that tunes a table: each cell takes the overrides chosen for its value of `by`."""

    table: str
    by: str


@dataclass(frozen=True)
class Table:
    """A table.

    train:       overrides of every cell
    cells:       blocks, each the product of its axes {axis: [values]}; value v of axis a means a=v
    bundles:     {axis: {value: [overrides]}}, for values that stand for several overrides
    rules:       [{when: {axis: value}, train: [overrides]}], for the cells that match
    tuned:       the search that chose further overrides
    seeds:       runs per cell
    rows, columns: the axes down and across in the report
    split:       the images that top-1 is measured on, in words; by default from data.holdout
    seed_std:    known standard deviation between seeds, in points; source in seed_std_source
    file:        the YAML file, if it is not one of TABLES
    minutes:     estimate for a run of the first cell on `hardware`, until runs are measured
    relative:    {axis: {value: factor}}, the time of other cells relative to the first
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
    relative: dict[str, dict[Any, float]] = field(default_factory=dict)
    split: str = ""
    seed_std: float | None = None
    seed_std_source: str = ""
    file: str = ""

    @property
    def argument(self) -> str:
        """The shell argument that names the table: table=NAME, or table= with the path as given."""
        return shlex.quote(f"table={self.file or self.name}")

    def estimate(self, cell: Cell) -> Estimate:
        """Return the time of a run of the cell as the table states it."""
        factors = [self.relative.get(axis, {}).get(v, 1) for axis, v in cell.labels.items()]
        seconds = 60 * self.minutes * math.prod(factors)
        return Estimate(seconds, f"estimate for {self.hardware}")

    def expand(self, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
        """Return the cells in order.

        chosen: what the search has chosen, {value of `by`: {key: value}}; None: leave it out.
        Raises ConfigError if the search has chosen nothing for a cell.
        """
        cells: dict[str, Cell] = {}
        for block in self.cells:
            for values in itertools.product(*block.values()):
                labels = dict(zip(block, values, strict=True))
                cell = Cell(cell_name(labels), labels, tuple(self._overrides(labels, chosen)))
                cells.setdefault(cell.name, cell)  # blocks may have cells in common
        return list(cells.values())

    def _overrides(
        self, labels: dict[str, Any], chosen: Mapping[str, Mapping[str, Any]] | None
    ) -> Iterator[str]:
        """Yield the overrides of the cell with these labels."""
        yield from self.train
        for axis, value in labels.items():
            yield from self.bundles[axis][value] if axis in self.bundles else [f"{axis}={value}"]
        for rule in self.rules:
            wanted = {a: v if isinstance(v, list) else [v] for a, v in rule["when"].items()}
            if all(labels.get(axis) in values for axis, values in wanted.items()):
                yield from rule["train"]
        if self.tuned is not None and chosen is not None:
            group = str(labels[self.tuned.by])
            if group not in chosen:
                raise ConfigError(
                    f"table {self.name}: the search {self.tuned.table} has nothing for {group}"
                )
            yield from (f"{key}={value}" for key, value in chosen[group].items())


def cell_name(labels: Mapping[str, Any]) -> str:
    """Join the labels into a folder name: text as is, numbers after the axis's last part."""
    parts = (v if isinstance(v, str) else f"{a.rpartition('.')[2]}{v}" for a, v in labels.items())
    return "-".join(part.replace("/", "_") for part in parts)


def table_names() -> list[str]:
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def load_table(name: str, seeds: int | None = None) -> Table:
    """Load a table by name or YAML file; `seeds`, if given, replaces its number of seeds.

    Raises ConfigError for an unknown name or a malformed file.
    """
    path = Path(name) if name.endswith(".yaml") else TABLES / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no table '{name}' (table=NAME or table=FILE.yaml); {nearest(name, table_names())}"
        )
    try:
        content = yaml.safe_load(path.read_text())
        for key, kind in {"tuned": Tuned, "search": Search}.items():
            if key in content:
                content[key] = kind(**content[key])
        for key, kind in {"references": Reference, "comparisons": Comparison}.items():
            content[key] = [kind(**item) for item in content.get(key, [])]
        content["seeds"] = content["seeds"] if seeds is None else seeds
        overrides = dict(word.split("=", 1) for word in content["train"] if "=" in word)
        holdout = overrides.get("data.holdout", "0")
        held_out = f"{holdout} training images that were held out"
        content.setdefault("split", "the test set" if holdout == "0" else held_out)
        table = Table(name=path.stem, file=name if name.endswith(".yaml") else "", **content)
        check_table(table)
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    return table


def check_table(table: Table) -> None:
    """Raise ConfigError for unknown cells or axes, an unknown `expect`, or less than one seed."""
    cells = table.expand()
    axes = {axis for cell in cells for axis in cell.labels}
    pairs = [(item.first, item.second) for item in table.comparisons]
    named = [*(item.cell for item in table.references), *itertools.chain(*pairs)]
    for kind, names, valid in (
        ("cell", named, {cell.name for cell in cells}),
        ("axis", [*table.rows, *table.columns], axes),
        ("expect", [item.expect for item in table.comparisons], {"higher", "equal", "lower"}),
    ):
        for name in names:
            if name not in valid:
                raise ConfigError(f"table {table.name}: no {kind} '{name}'; {nearest(name, valid)}")
    if table.seeds < 1:
        raise ConfigError(f"seeds={table.seeds}: must be at least 1")


def table_runs(
    table: Table,
    root: str | Path,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
    overrides: Sequence[str] = (),
) -> list[TableRun]:
    """Return all runs of the table, with further `overrides` for each.

    The first seed of every cell comes before the second seed of any, so that a table can be made
    from the first part of the runs.
    """
    cells, folder = table.expand(chosen), Path(root) / table.name
    runs = []
    for seed, cell in itertools.product(range(table.seeds), cells):
        name = f"{cell.name}-s{seed}"
        tags = ",".join(quoted(tag) for tag in (f"table={table.name}", f"cell={cell.name}"))
        own = (f"seed={seed}", f"name={quoted(name)}", f"runs_dir={quoted(str(folder))}")
        own += (f"logger.group={quoted(table.name)}", f"logger.tags=[{tags}]")
        arguments = (*cell.overrides, *own, *overrides)
        stated = table.estimate(cell)
        runs.append(TableRun(folder / name, arguments, table.name, cell, seed, stated=stated))
    return runs


def reported_runs(table: Table, root: str | Path, results: str | Path) -> list[TableRun]:
    """Return all runs of the table; none if the search that tunes it has not chosen yet."""
    if table.tuned and not chosen_path(table.tuned.table, results).is_file():
        return []
    return table_runs(table, root, read_chosen(table, results))


def read_chosen(table: Table, results: str | Path) -> dict[str, dict[str, Any]] | None:
    """Read what the table's search has chosen; None if no search tunes the table.

    Raises ConfigError if the search has not chosen yet.
    """
    if table.tuned is None:
        return None
    path = chosen_path(table.tuned.table, results)
    if not path.is_file():
        search = f"table={table.tuned.table}"
        raise ConfigError(
            f"{path} is missing: first scripts/reproduce.py run {search}, "
            f"then scripts/reproduce.py choose {search}"
        )
    return json.loads(path.read_text())["chosen"]


def chosen_path(search: str, results: str | Path) -> Path:
    """Return the path of a search's chosen.json: the one in `results`, else the package's own."""
    path, shipped = (Path(folder) / search / "chosen.json" for folder in (results, SHIPPED))
    return shipped if shipped.is_file() and not path.is_file() else path
