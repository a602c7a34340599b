"""Statistics of a table: mean and spread of each cell, and the comparisons that claims rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from proxynorm.paper.records import Record
from proxynorm.paper.table import Comparison, Reference, Table


@dataclass(frozen=True)
class Sample:
    """The metric of a cell's runs, in seed order."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds (n − 1 in the denominator); None for a single run."""
        return stdev(self.values) if self.n > 1 else None

    def __str__(self) -> str:
        if not self.n:
            return ""
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class Outcome:
    """A comparison's result: first − second in points; 95 % interval and p by Welch, if n > 1."""

    comparison: Comparison
    first: Sample
    second: Sample
    difference: float | None
    interval: tuple[float, float] | None
    p: float | None
    verdict: str


def cell_samples(table: Table, records: Sequence[Record]) -> dict[str, Sample]:
    """The sample of every cell, empty where nothing has been run."""
    values: dict[str, list[float]] = {cell.name: [] for cell in table.expand()}
    for record in sorted(records, key=lambda record: record.seed):
        values[record.cell].append(record.summary[table.metric])
    return {name: Sample(tuple(found)) for name, found in values.items()}


def cell_status(
    table: Table, sample: Sample, running: int, failed: int, reference: Reference | None
) -> str:
    """A cell's state in words, with failures and whether it is within the tolerance."""
    words = []
    if not sample.n:
        words += ["running"] if running else [] if failed else ["not run"]
    elif sample.n < table.seeds:
        words += [f"{sample.n}/{table.seeds} seeds"] + (["running"] if running else [])
    else:
        words.append("done")
    if reference is not None and sample.n:
        near = abs(sample.mean - reference.value) <= table.tolerance
        words.append("within" if near else "outside")
    return ", ".join(words + ([f"{failed} failed"] if failed else []))


def seed_spread(table: Table, samples: Mapping[str, Sample]) -> float | None:
    """Standard deviation between seeds in points: pooled over the cells, else the table's own."""
    spread = [sample for sample in samples.values() if sample.n > 1]
    if not spread:
        return table.seed_std
    freedom = sum(sample.n - 1 for sample in spread)
    return math.sqrt(sum((sample.n - 1) * sample.std**2 for sample in spread) / freedom)


def compare(table: Table, samples: Mapping[str, Sample]) -> list[Outcome]:
    """The outcome of each of the table's comparisons."""
    spread = seed_spread(table, samples)
    return [
        outcome(item, samples[item.first], samples[item.second], table.margin, spread)
        for item in table.comparisons
    ]


def outcome(
    comparison: Comparison, first: Sample, second: Sample, margin: float, spread: float | None
) -> Outcome:
    """Difference, Welch's test and verdict; `spread` judges single runs."""
    if not (first.n and second.n):
        return Outcome(comparison, first, second, None, None, None, "not run")
    difference = first.mean - second.mean
    if min(first.n, second.n) < 2:
        words = single_verdict(difference, spread)
        return Outcome(comparison, first, second, difference, None, None, words)
    if first.std == second.std == 0:  # Welch's t is undefined
        interval, p = (difference, difference), float(difference == 0)
    else:
        test = stats.ttest_ind(first.values, second.values, equal_var=False)
        low, high = test.confidence_interval(0.95)
        interval, p = (float(low), float(high)), float(test.pvalue)
    words = verdict(comparison.expect, interval, margin)
    return Outcome(comparison, first, second, difference, interval, p, words)


def single_verdict(difference: float, spread: float | None) -> str:
    """The verdict on two single runs: within two standard deviations of their difference or not."""
    if spread is None:
        return "single seed, spread unknown"
    below = abs(difference) < 2 * math.sqrt(2) * spread
    return f"single seed, {'below' if below else 'beyond'} the seed spread"


def verdict(expect: str, interval: tuple[float, float], margin: float) -> str:
    """shown, contradicted or not shown.

    higher, lower: the interval lies on that side of zero. equal: the first is not worse than the
    second by `margin` points or more, so that it matches or exceeds it.
    """
    low, high = interval
    if expect == "equal":
        return "shown" if low > -margin else "contradicted" if high < -margin else "not shown"
    if expect == "lower":
        low, high = -high, -low
    return "shown" if low > 0 else "contradicted" if high < 0 else "not shown"


def p_value(p: float) -> str:
    """Format a p value."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
