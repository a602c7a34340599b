"""Statistics of a table: mean and spread of its cells, and the comparisons behind the claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import stats

from proxynorm.paper.table import Comparison, Table

Interval = tuple[float, float]
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


class Spread(NamedTuple):
    """A standard deviation between seeds, in points, and its degrees of freedom."""

    std: float
    freedom: float


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison. difference: of the means, first − second, in points.

    interval, p: see `t_test`; None for single runs. is_interim: several seeds were run, but fewer
    than the table declares.
    """

    comparison: Comparison
    first: Sample
    second: Sample
    verdict: str
    difference: float | None = None
    interval: Interval | None = None
    p: float | None = None
    is_interim: bool = False

    def __str__(self) -> str:
        return f"{self.verdict} so far" if self.is_interim else self.verdict


def cell_status(table: Table, sample: Sample, failed: int) -> str:
    """Return the state of a cell in words; failed: the number of its failed runs."""
    if sample.n >= table.seeds:
        state = "done"
    elif sample.n:
        state = f"{sample.n}/{table.seeds} seeds"
    else:
        state = "" if failed else "not run"
    return ", ".join(filter(None, [state, f"{failed} failed" if failed else ""]))


def seed_spread(table: Table, samples: Mapping[str, Sample]) -> Spread | None:
    """Return the standard deviation between seeds, pooled over the cells with several seeds.

    If there are none, return the table's own seed_std, if known.
    """
    repeated = [sample for sample in samples.values() if sample.n > 1]
    if not repeated:
        return None if table.seed_std is None else Spread(table.seed_std, math.inf)
    freedom = sum(sample.n - 1 for sample in repeated)
    variance = sum((sample.n - 1) * sample.std**2 for sample in repeated) / freedom
    return Spread(math.sqrt(variance), freedom)


def compare(table: Table, samples: Mapping[str, Sample]) -> list[Outcome]:
    """Return the outcome of each of the table's comparisons."""
    spread = seed_spread(table, samples)
    outcomes = []
    for item in table.comparisons:
        found = outcome(item, samples[item.first], samples[item.second], spread)
        count = min(found.first.n, found.second.n)
        outcomes.append(replace(found, is_interim=1 < count < table.seeds))
    return outcomes


def outcome(
    comparison: Comparison, first: Sample, second: Sample, spread: Spread | None
) -> Outcome:
    """Compare two samples by `t_test`, or by the `spread` of seeds if either is a single run."""
    if not (first.n and second.n):
        return Outcome(comparison, first, second, "not run")
    difference = first.mean - second.mean
    if min(first.n, second.n) > 1:
        interval, p = t_test(first, second, spread)
        words = verdict(comparison.expect, interval)
        return Outcome(comparison, first, second, words, difference, interval, p)
    if spread is None:
        words = "spread unknown"
    else:
        limit = 2 * math.sqrt(2) * spread.std  # two standard deviations of a difference
        words = "beyond the seed spread" if abs(difference) >= limit else "below the seed spread"
    return Outcome(comparison, first, second, f"single seed, {words}", difference)


def t_test(first: Sample, second: Sample, spread: Spread | None = None) -> tuple[Interval, float]:
    """Return the 95 % interval of the difference of the means, and its two-sided p.

    By Welch's t-test. If a sample has only two runs, that test has about one degree of freedom and
    shows nothing, so Student's test with the `spread` of the whole table replaces it.
    """
    difference = first.mean - second.mean
    if spread is not None and spread.std and min(first.n, second.n) == 2:
        error = spread.std * math.sqrt(1 / first.n + 1 / second.n)
        half = error * float(stats.t.ppf(0.975, spread.freedom))
        p = 2 * float(stats.t.sf(abs(difference) / error, spread.freedom))
        return (difference - half, difference + half), p
    if first.std == second.std == 0:  # Welch's t is undefined
        return (difference, difference), float(difference == 0)
    test = stats.ttest_ind(first.values, second.values, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return (float(low), float(high)), float(test.pvalue)


def verdict(expect: str, interval: Interval) -> str:
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


def interval_text(interval: Interval) -> str:
    return f"{interval[0]:+.2f} … {interval[1]:+.2f}"


def gap_sentence(
    bn: Sample, plain: Sample, proxied: Sample, norm: str, spread: Spread | None = None
) -> str:
    """Say how much of the gap between BN and `norm` PN closes, in one sentence.

    plain, proxied: `norm` without and with PN; spread: see `t_test`. A difference is not
    significant if p > 0.05. With single runs it is not tested, and the sentence says so.
    """

    def is_chance(first: Sample, second: Sample) -> bool:
        return min(first.n, second.n) > 1 and t_test(first, second, spread)[1] > 0.05

    gap, closed, after = bn.mean - plain.mean, proxied.mean - plain.mean, proxied.mean - bn.mean
    between = f"{gap:.2f} points between {norm} and BN"
    interval = ""
    if gap <= 0:
        text = f"{norm} is not behind BN here ({-gap:+.2f} points): there is no gap for PN to close"
    elif is_chance(bn, plain):
        text = f"The {between} are not significant; PN adds {closed:+.2f}"
        text += ", which is not significant either" if is_chance(proxied, plain) else ""
    elif is_chance(proxied, plain):
        text = f"{norm} is {gap:.2f} points behind BN; PN adds {closed:+.2f}"
        text += ", which is not significant"
    elif closed < 0:
        text = f"PN widens the {between} by {-closed:.2f}"
    else:
        text = f"PN closes {f'{closed:.2f} of' if closed < gap else 'all of'} the {between}; "
        text += f"{norm}+PN and BN then differ by {after:+.2f}"
        if min(proxied.n, bn.n) > 1:
            interval = f"95 % interval {interval_text(t_test(proxied, bn, spread)[0])}, "
    counts = sorted({sample.n for sample in (bn, plain, proxied)})
    seeds = "one seed each, spread unknown" if counts == [1] else f"n = {span(counts)}"
    untested = ", untested" if counts[0] == 1 < counts[-1] else ""
    return f"{text} ({interval}{seeds}{untested})."


def span(counts: Sequence[int]) -> str:
    """Format the range of sorted counts: 5 or 3–5."""
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
