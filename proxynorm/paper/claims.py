"""The poster's claims and their evidence: tests, and comparisons of measured tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from proxynorm.analysis.tables import markdown_table
from proxynorm.paper.compare import Outcome, p_value

CLAIMS = Path(__file__).with_name("claims.yaml")


@dataclass(frozen=True)
class Claim:
    """A claim in claims.yaml; the first lines of that file explain the keys."""

    claim: str
    tests: list[str] = field(default_factory=list)
    comparisons: list[str] = field(default_factory=list)
    scope: str = ""
    note: str = ""
    reason: str = ""
    needs: str = ""

    @property
    def tables(self) -> list[str]:
        return list(dict.fromkeys(item.partition(":")[0] for item in self.comparisons))


def load_claims() -> list[Claim]:
    return [Claim(**item) for item in yaml.safe_load(CLAIMS.read_text())]


def claim_status(claim: Claim, outcomes: Sequence[Outcome]) -> str:
    """Return the weakest verdict of the comparisons that were run.

    For a claim without comparisons, tests suffice.
    """
    if claim.needs:
        return f"needs {claim.needs}"
    verdicts = {outcome.verdict for outcome in outcomes}
    if verdicts == {"not run"}:
        return "not run"
    if "contradicted" in verdicts:
        status = "contradicted"
    elif "not shown" in verdicts:
        status = "not shown"
    elif verdicts <= {"shown", "not run"}:
        status = f"shown {claim.scope}".strip()
    else:
        status = "undecided: one seed"
    so_far = " so far" if any(outcome.is_interim for outcome in outcomes) else ""
    partly = "; in part not run" if "not run" in verdicts else ""
    return f"{status}{so_far}{partly}"


def evidence(claim: Claim, outcomes: Sequence[Outcome]) -> str:
    """List tests, comparisons with difference, n and p, the note, and why a claim is not shown."""
    parts = [f"`{name}`" for name in claim.tests]
    for item, outcome in zip(claim.comparisons, outcomes, strict=True):
        if outcome.difference is None:
            parts.append(f"{item}: not run")
            continue
        p = f", p {p_value(outcome.p)}" if outcome.p is not None else ""
        counts = f"n {outcome.first.n} and {outcome.second.n}"
        parts.append(f"{item}: {outcome.difference:+.2f} points, {counts}{p}: {outcome}")
    is_shown = claim_status(claim, outcomes).startswith("shown")
    why = "" if is_shown or not claim.reason else f"why: {claim.reason}"
    return "; ".join(filter(None, [*parts, claim.note, why]))


def claims_report(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return the claims as a Markdown table. outcomes: by table."""
    by_name = {
        f"{table}: {outcome.comparison.first} - {outcome.comparison.second}": outcome
        for table, table_outcomes in outcomes.items()
        for outcome in table_outcomes
    }
    rows = [["claim", "evidence here", "status"]]
    for claim in load_claims():
        own = [by_name[item] for item in claim.comparisons]
        rows.append([claim.claim, evidence(claim, own), claim_status(claim, own)])
    return (
        f"# The poster's claims\n\n{markdown_table(rows)}\n\n"
        "Tests are those of tests/acceptance/test_claims.py, on random and small networks; "
        "comparisons are those of the tables' reports (results/TABLE/report.md), on "
        "Fashion-MNIST. A status that rests on tests alone says what small networks show.\n"
    )
