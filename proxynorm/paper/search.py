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

DIVERGED = ": not finite, "  # in the error line of a run whose loss or gradient became infinite
Point = tuple[float, ...]


def choose(table: Table, runs: Sequence[TableRun], results: str | Path) -> dict[str, Any]:
    """Choose, for each value of the search's axis `by`, the point with the best mean metric.

    Returns {"table", "metric", "seeds", "chosen": {place: {axis: value}}, "tried": {place:
    {"value value": mean metric}}, "at_edge": {place: axes whose chosen value is the smallest or
    largest tried}}.
    Raises ConfigError for a table that is no search, and while runs are missing.
    """
    if table.search is None:
        raise ConfigError(f"table {table.name} is not a search; nothing is chosen from it")
    axes = table.search.axes
    chosen, tried, at_edge = {}, {}, {}
    for place, points in mean_metric(table, runs, results).items():
        best = max(points, key=points.get)
        if points[best] == -math.inf:
            raise ConfigError(
                f"table {table.name}: every value tried for {place} diverged; extend the search"
            )
        chosen[place] = dict(zip(axes, best, strict=True))
        tried[place] = {
            " ".join(map(str, point)): "diverged" if score == -math.inf else round(score, 4)
            for point, score in points.items()
        }
        columns = zip(axes, best, zip(*points))
        edges = [axis for axis, value, values in columns if value in (min(values), max(values))]
        if edges:
            at_edge[place] = edges
    metric = f"top1 on {table.split}"
    found = {"chosen": chosen, "tried": tried, "at_edge": at_edge}
    return {"table": table.name, "metric": metric, "seeds": table.seeds, **found}


def mean_metric(
    table: Table, runs: Sequence[TableRun], results: str | Path
) -> dict[str, dict[Point, float]]:
    """{place: {values of the axes: mean metric over seeds}}, −inf where a run diverged.

    Raises ConfigError if runs are missing.
    """
    scores: dict[str, dict[Point, list[float]]] = defaultdict(lambda: defaultdict(list))
    missing = []
    for run in runs:
        record, labels = read_record(run, results), run.cell.labels
        # A run that failed for another reason than divergence is missing.
        if record is None or DIVERGED not in (record.failure or DIVERGED):
            missing.append(run.name)
            continue
        score = -math.inf if record.failure else record.summary["top1"]
        point = tuple(float(labels[axis]) for axis in table.search.axes)
        scores[str(labels[table.search.by])][point].append(score)
    if missing:
        raise ConfigError(
            f"table {table.name}: {len(missing)} runs are not done ({', '.join(missing[:3])} …): "
            f"scripts/reproduce.py run {table.argument}"
        )
    return {place: {p: mean(v) for p, v in points.items()} for place, points in scores.items()}


def protocol(table: Table, results: str | Path) -> str:
    """State the grid, seeds and runs that each place got in the table's search; "" without one.

    And how many of the search's seeds what it has chosen in `results` rests on, if not on all.
    """
    search = load_table(table.tuned.table) if table.tuned else table
    if search.search is None:
        return ""
    by, axes = search.search.by, search.search.axes
    grids: dict[str, set[Point]] = defaultdict(set)
    for cell in search.expand():
        grids[str(cell.labels[by])].add(tuple(cell.labels[axis] for axis in axes))
    words = f"{search.seeds} seed{'s' if search.seeds > 1 else ''}"
    (usual, _), *others = Counter(map(frozenset, grids.values())).most_common()
    count = f"{len(usual)} points of {' × '.join(axes)}, {words}: {search.seeds * len(usual)} runs"
    path = chosen_path(search.name, results)
    used = json.loads(path.read_text()).get("seeds") if table.tuned and path.is_file() else None
    so_far = "" if used in (None, search.seeds) else f" Chosen so far with {used} of {words}."
    if not others:
        return f"Search {search.name}: every {by} got the same {count}.{so_far}"
    extra = [
        f"{place} ({search.seeds * len(grid)} runs)"
        for place, grid in grids.items()
        if grid != usual
    ]
    return (
        f"Search {search.name}: each {by} got {count}; another grid for {', '.join(extra)}.{so_far}"
    )
