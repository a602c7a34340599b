"""Choose a table's hyper-parameter from the finished runs of its search."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from proxynorm.errors import ConfigError
from proxynorm.launch.runs import Run
from proxynorm.paper.records import FAILURE, kept_files
from proxynorm.paper.table import Table

DIVERGED = (
    b": not finite, "  # in the error line of a run whose loss or gradient left the finite numbers
)


def choose(table: Table, runs: Sequence[Run], results: str | Path) -> dict[str, Any]:
    """For each place on the search's axis `by`, the values with the best mean metric over seeds, of the runs in their
    folders or kept in `results`.

    Returns {"table", "metric", "chosen": {place: {axis: value}}, "tried": {place: {"value value": mean metric}},
    "at_edge": {place: the axes whose chosen value is the smallest or largest tried}}. Raises ConfigError for a table
    that is no search, and while runs are missing.
    """
    if table.search is None:
        raise ConfigError(f"table {table.name} is not a search; nothing is chosen from it")
    axes, tried = table.search.axes, mean_metric(table, runs, results)
    best = {place: max(points, key=points.get) for place, points in tried.items()}
    edges = {place: at_edge(best[place], list(points), axes) for place, points in tried.items()}
    return {
        "table": table.name,
        "metric": f"{table.metric} on {table.split}",
        "chosen": {place: dict(zip(axes, point, strict=True)) for place, point in best.items()},
        "tried": {
            place: {" ".join(map(str, point)): shown(score) for point, score in points.items()}
            for place, points in tried.items()
        },
        "at_edge": {place: found for place, found in edges.items() if found},
    }


def at_edge(
    best: tuple[float, ...], tried: Sequence[tuple[float, ...]], axes: Sequence[str]
) -> list[str]:
    """The axes on which `best` is the smallest or the largest value tried."""
    columns = zip(axes, best, zip(*tried, strict=True), strict=True)
    return [axis for axis, value, values in columns if value in (min(values), max(values))]


def shown(score: float) -> float | str:
    return round(score, 4) if math.isfinite(score) else "diverged"


def mean_metric(
    table: Table, runs: Sequence[Run], results: str | Path
) -> dict[str, dict[tuple[float, ...], float]]:
    """{place: {values of the axes: mean metric over seeds}}, −inf where a run diverged. Raises ConfigError if runs are missing."""
    scores: dict[str, dict[tuple[float, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    missing = []
    for run in runs:
        files, labels = kept_files(run, results), run.cell.labels
        if files is None or DIVERGED not in files.get(FAILURE, DIVERGED):
            missing.append(run.name)
            continue
        score = -math.inf if FAILURE in files else json.loads(files["summary.json"])[table.metric]
        point = tuple(float(labels[axis]) for axis in table.search.axes)
        scores[str(labels[table.search.by])][point].append(score)
    if missing:
        raise ConfigError(
            f"table {table.name}: {len(missing)} runs are not done ({', '.join(missing[:3])} …): "
            f"scripts/reproduce.py run {table.argument}"
        )
    means = {
        place: {value: mean(values) for value, values in row.items()}
        for place, row in scores.items()
    }
    for place, values in means.items():
        if max(values.values()) == -math.inf:
            raise ConfigError(
                f"table {table.name}: every value tried for {place} diverged; extend the search"
            )
    return means
