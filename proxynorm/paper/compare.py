"""Statistics of a table: mean and spread of its cells, and the comparisons behind the claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from proxynorm.paper.table import Comparison, Reference, Table

MARGIN = 0.3  # points by which a cell may be worse than another and still match it


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
    """The result of a comparison. difference: of the means, first − second, in points.

    interval: 95 % interval of the difference, and p: both by Welch's t-test, if both n > 1.
    """

    comparison: Comparison
    first: Sample
    second: Sample
    verdict: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None


def cell_status(
    table: Table, sample: Sample, running: int, failed: int, reference: Reference | None
) -> str:
    """Return the state of a cell in words, and whether it is within tolerance of the reference.

    running, failed: numbers of its runs.
    """
    parts = []
    if sample.n >= table.seeds:
        parts.append("done")
    elif sample.n:
        parts.append(f"{sample.n}/{table.seeds} seeds")
    elif not (running or failed):
        parts.append("not run")
    if running and sample.n < table.seeds:
        parts.append("running")
    if reference is not None and sample.n:
        near = abs(sample.mean - reference.value) <= table.tolerance
        parts.append("within" if near else "outside")
    if failed:
        parts.append(f"{failed} failed")
    return ", ".join(parts)


def seed_spread(table: Table, samples: Mapping[str, Sample]) -> float | None:
    """Return the standard deviation between seeds, in points.

    It is pooled over the cells with several seeds; without any, it is the table's own seed_std.
    """
    repeated = [sample for sample in samples.values() if sample.n > 1]
    if not repeated:
        return table.seed_std
    freedom = sum(sample.n - 1 for sample in repeated)
    return math.sqrt(sum((sample.n - 1) * sample.std**2 for sample in repeated) / freedom)


def compare(table: Table, samples: Mapping[str, Sample]) -> list[Outcome]:
    """Return the outcome of each of the table's comparisons."""
    spread = seed_spread(table, samples)
    return [
        outcome(item, samples[item.first], samples[item.second], spread)
        for item in table.comparisons
    ]


def outcome(comparison: Comparison, first: Sample, second: Sample, spread: float | None) -> Outcome:
    """Compare two samples: by Welch's t-test, or by the `spread` between seeds for single runs."""
    if not (first.n and second.n):
        return Outcome(comparison, first, second, "not run")
    difference = first.mean - second.mean
    if min(first.n, second.n) > 1:
        interval, p = welch(first, second)
        words = verdict(comparison.expect, interval)
        return Outcome(comparison, first, second, words, difference, interval, p)
    if spread is None:
        words = "spread unknown"
    else:
        limit = 2 * math.sqrt(2) * spread  # two standard deviations of a difference
        words = "beyond the seed spread" if abs(difference) >= limit else "below the seed spread"
    return Outcome(comparison, first, second, f"single seed, {words}", difference)


def welch(first: Sample, second: Sample) -> tuple[tuple[float, float], float]:
    """Return the 95 % interval of the difference and the two-sided p of Welch's t-test."""
    if first.std == second.std == 0:  # Welch's t is undefined
        difference = first.mean - second.mean
        return (difference, difference), float(difference == 0)
    test = stats.ttest_ind(first.values, second.values, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return (float(low), float(high)), float(test.pvalue)


def verdict(expect: str, interval: tuple[float, float]) -> str:
    """Return "shown", "contradicted" or "not shown".

    "shown" if the interval lies above 0 (higher), below 0 (lower), or above −MARGIN (equal: matches
    or exceeds); "contradicted" if it lies on the other side.
    """
    low, high = interval
    if expect == "equal":
        return "shown" if low > -MARGIN else "contradicted" if high < -MARGIN else "not shown"
    if expect == "lower":
        low, high = -high, -low
    return "shown" if low > 0 else "contradicted" if high < 0 else "not shown"


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def gap_sentence(bn: Sample, plain: Sample, proxied: Sample, norm: str) -> str:
    """Say how much of the gap between BN and `norm` PN closes, in one sentence.

    plain, proxied: `norm` without and with PN. Differences are not significant if p > 0.05 by
    Welch's test; those of single runs are called untested.
    """
    gap, closed = bn.mean - plain.mean, proxied.mean - plain.mean
    between = f"{gap:.2f} points between {norm} and BN"
    if gap <= 0:
        text = f"{norm} is not behind BN here ({-gap:+.2f} points): there is no gap for PN to close"
    elif not_significant(bn, plain):
        text = f"The {between} are not significant; PN adds {closed:+.2f}"
        text += ", which is not significant either" if not_significant(proxied, plain) else ""
    elif not_significant(proxied, plain):
        text = f"{norm} is {gap:.2f} points behind BN; PN adds {closed:+.2f}"
        text += ", which is not significant"
    elif closed < 0:
        text = f"PN widens the {between} by {-closed:.2f}"
    else:
        text = f"PN closes {f'{closed:.2f} of' if closed < gap else 'all of'} the {between}; "
        ahead = proxied.mean - bn.mean
        if not_significant(proxied, bn):
            text += f"{norm}+PN and BN then differ by {ahead:+.2f}, which is not significant"
        else:
            side = "ahead of" if ahead > 0 else "behind"
            text += f"{norm}+PN is {abs(ahead):.2f} {side} BN"
    counts = sorted({sample.n for sample in (bn, plain, proxied)})
    seeds = "one seed each, spread unknown" if counts == [1] else f"n = {span(counts)}"
    untested = ", untested" if counts[0] == 1 < counts[-1] else ""
    return f"{text} ({seeds}{untested})."


def not_significant(first: Sample, second: Sample) -> bool:
    """Return whether the means do not differ significantly. False for single runs."""
    return min(first.n, second.n) > 1 and welch(first, second)[1] > 0.05


def span(counts: Sequence[int]) -> str:
    """Format the range of sorted counts: 5 or 3–5."""
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
