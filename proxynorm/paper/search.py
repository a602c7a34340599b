"""Choose a table's hyper-parameters from the finished runs of its search."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from proxynorm.errors import ConfigError
from proxynorm.paper.records import read_record
from proxynorm.paper.table import Table, TableRun, chosen_path, load_table

DIVERGED = ": not finite, "  # in the error of a run whose loss or gradient became infinite or NaN
Point = tuple[Any, ...]


def choose(table: Table, runs: Sequence[TableRun], results: str | Path) -> dict[str, Any]:
    """Choose the point with the best mean top-1 for each group (value of the axis `by`).

    Returns the content of chosen.json:
        table, metric, seeds: what was searched, and how
        chosen:  {group: {axis: value}}
        tried:   {group: {"value value": mean top-1}}
        at_edge: {group: axes whose chosen value is the smallest or largest that was tried}
    Raises ConfigError if the table is not a search, if runs are missing or if all have diverged.
    """
    if table.search is None:
        raise ConfigError(f"table {table.name} is not a search; nothing is chosen from it")
    axes = table.search.axes
    chosen, tried, at_edge = {}, {}, {}
    for group, points in mean_top1(table, runs, results).items():
        best = max(points, key=points.get)
        if points[best] == -math.inf:
            raise ConfigError(
                f"table {table.name}: every value tried for {group} diverged; extend the search"
            )
        chosen[group] = dict(zip(axes, best, strict=True))
        tried[group] = {
            " ".join(map(str, point)): "diverged" if score == -math.inf else round(score, 4)
            for point, score in points.items()
        }
        columns = zip(axes, best, zip(*points))
        if edges := [axis for axis, value, values in columns if is_extreme(value, values)]:
            at_edge[group] = edges
    return {
        "table": table.name,
        "metric": f"top1 on {table.split}",
        "seeds": table.seeds,
        "chosen": chosen,
        "tried": tried,
        "at_edge": at_edge,
    }


def as_number(value: Any) -> Any:
    """Convert text that spells a number: YAML 1.1 reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def is_extreme(value: Any, tried: Sequence[Any]) -> bool:
    """Return whether the value is the smallest or largest number that was tried."""
    numbers = [number for number in tried if isinstance(number, (int, float))]
    return value in numbers and value in (min(numbers), max(numbers))


def mean_top1(
    table: Table, runs: Sequence[TableRun], results: str | Path
) -> dict[str, dict[Point, float]]:
    """Return {group: {point: mean top-1 over seeds}}; −inf if a run of the point diverged.

    Raises ConfigError if runs are missing.
    """
    scores: dict[str, dict[Point, list[float]]] = defaultdict(lambda: defaultdict(list))
    missing = []
    for run in runs:
        record, labels = read_record(run, results), run.cell.labels
        # A run that failed for any other reason than divergence counts as missing.
        if record is None or (record.failure and DIVERGED not in record.failure):
            missing.append(run.name)
            continue
        score = -math.inf if record.failure else record.summary["top1"]
        point = tuple(as_number(labels[axis]) for axis in table.search.axes)
        scores[str(labels[table.search.by])][point].append(score)
    if missing:
        raise ConfigError(
            f"table {table.name}: {len(missing)} runs are not done ({', '.join(missing[:3])} …): "
            f"scripts/reproduce.py run {table.argument}"
        )
    return {group: {p: mean(v) for p, v in points.items()} for group, points in scores.items()}


def protocol(table: Table, results: str | Path) -> str:
    """State the grid, seeds and runs of each group in the table's search; "" without a search.

    If the choice in `results` was made before all seeds were run, also say with how many.
    """
    search = load_table(table.tuned.table) if table.tuned else table
    if search.search is None:
        return ""
    by, axes = search.search.by, search.search.axes
    grids: dict[str, set[Point]] = defaultdict(set)
    for cell in search.expand():
        grids[str(cell.labels[by])].add(tuple(cell.labels[axis] for axis in axes))
    seeds = f"{search.seeds} seed{'s' if search.seeds > 1 else ''}"
    usual = Counter(map(frozenset, grids.values())).most_common(1)[0][0]
    count = f"{len(usual)} points of {' × '.join(axes)}, {seeds}: {search.seeds * len(usual)} runs"
    extra = [
        f"{group} ({search.seeds * len(grid)} runs)"
        for group, grid in grids.items()
        if grid != usual
    ]
    text = f"every {by} got the same {count}"
    if extra:
        text = f"each {by} got {count}; another grid for {', '.join(extra)}"
    path = chosen_path(search.name, results)
    used = json.loads(path.read_text()).get("seeds") if table.tuned and path.is_file() else None
    so_far = "" if used in (None, search.seeds) else f" Chosen so far with {used} of {seeds}."
    return f"Search {search.name}: {text}.{so_far}"
