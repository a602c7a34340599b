"""Statistics of a table: mean and spread of each cell, and the comparisons that claims rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from proxynorm.paper.table import Comparison, Reference, Table

MARGIN = 0.3  # points by which a cell may fall behind another and still match it


@dataclass(frozen=True)
class Sample:
    """The top-1 of a cell's runs, in seed order."""

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
        outcome(item, samples[item.first], samples[item.second], spread)
        for item in table.comparisons
    ]


def outcome(comparison: Comparison, first: Sample, second: Sample, spread: float | None) -> Outcome:
    """Difference, Welch's test and verdict; `spread` judges single runs."""
    if not (first.n and second.n):
        return Outcome(comparison, first, second, None, None, None, "not run")
    difference = first.mean - second.mean
    if min(first.n, second.n) < 2:
        words = "spread unknown"
        if spread is not None:  # two standard deviations of a difference
            beyond = abs(difference) >= 2 * math.sqrt(2) * spread
            words = f"{'beyond' if beyond else 'below'} the seed spread"
        words = f"single seed, {words}"
        return Outcome(comparison, first, second, difference, None, None, words)
    interval, p = welch(first, second)
    words = verdict(comparison.expect, interval)
    return Outcome(comparison, first, second, difference, interval, p, words)


def welch(first: Sample, second: Sample) -> tuple[tuple[float, float], float]:
    """The 95 % interval of the difference and the two-sided p of Welch's t-test."""
    if first.std == second.std == 0:  # Welch's t is undefined
        difference = first.mean - second.mean
        return (difference, difference), float(difference == 0)
    test = stats.ttest_ind(first.values, second.values, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return (float(low), float(high)), float(test.pvalue)


def verdict(expect: str, interval: tuple[float, float]) -> str:
    """shown, contradicted or not shown.

    higher, lower: the interval lies on that side of zero. equal: the first is not worse than the
    second by MARGIN points or more, so that it matches or exceeds it.
    """
    low, high = interval
    if expect == "equal":
        return "shown" if low > -MARGIN else "contradicted" if high < -MARGIN else "not shown"
    if expect == "lower":
        low, high = -high, -low
    return "shown" if low > 0 else "contradicted" if high < 0 else "not shown"


def p_value(p: float) -> str:
    """Format a p value."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def closing(bn: Sample, plain: Sample, proxied: Sample, norm: str) -> str:
    """How much of the gap between BN and `norm` PN closes, in one sentence.

    Differences that Welch's test does not tell from 0 (p > 0.05) are said to be within the spread
    of the seeds; those of single runs are said to be untested.
    """
    gap, closed = bn.mean - plain.mean, proxied.mean - plain.mean
    between = f"{gap:.2f} points between {norm} and BN"
    if gap <= 0:
        words = (
            f"{norm} is not behind BN here ({-gap:+.2f} points): there is no gap for PN to close"
        )
    elif within_spread(bn, plain):
        words = f"The {between} are within the spread of the seeds; PN adds {closed:+.2f}"
        words += ", within it too" if within_spread(proxied, plain) else ""
    elif within_spread(proxied, plain):
        words = f"PN does not close the {between}: it adds {closed:+.2f}"
        words += ", within the spread of the seeds"
    elif closed < 0:
        words = f"PN widens the {between} by {-closed:.2f}"
    else:
        words = f"PN closes {f'{closed:.2f} of' if closed < gap else 'all of'} the {between}; "
        ahead = proxied.mean - bn.mean
        if within_spread(proxied, bn):
            words += f"{norm}+PN and BN then differ by {ahead:+.2f}, within the spread of the seeds"
        else:
            side = "ahead of" if ahead > 0 else "behind"
            words += f"{norm}+PN is {abs(ahead):.2f} {side} BN"
    counts = sorted({sample.n for sample in (bn, plain, proxied)})
    seeds = "one seed each, spread unknown" if counts == [1] else f"n = {span(counts)}"
    untested = ", untested" if counts[0] == 1 < counts[-1] else ""
    return f"{words} ({seeds}{untested})."


def within_spread(first: Sample, second: Sample) -> bool:
    """Return whether Welch's test does not tell the means apart; False for single runs."""
    return min(first.n, second.n) > 1 and welch(first, second)[1] > 0.05


def span(counts: Sequence[int]) -> str:
    """Sorted counts as 5 or 3–5."""
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
