"""The table of claims: it names tests and comparisons that exist, and its status follows from them."""

from pathlib import Path

import pytest

from proxynorm.reproduce.claims import Claim, claim_outcomes, claim_status, claims_report, load_claims
from proxynorm.reproduce.comparing import Outcome, cell_samples, compare
from proxynorm.reproduce.table import load_table


def outcomes_without_runs():
    tables = {name: load_table(name) for claim in load_claims() for name in claim.tables}
    return {name: compare(table, cell_samples(table, [])) for name, table in tables.items()}


def test_claims_name_tests_that_exist():
    source = (Path(__file__).parents[1] / "test_claims.py").read_text()
    named = {name for claim in load_claims() for name in claim.tests}
    assert all(f"def {name}(" in source for name in named)


def test_every_claim_has_evidence_or_says_what_it_needs():
    assert all(claim.tests or claim.comparisons or claim.needs for claim in load_claims())


def test_claims_name_comparisons_that_exist():
    outcomes = outcomes_without_runs()
    for claim in load_claims():
        assert len(claim_outcomes(claim, outcomes)) == len(claim.comparisons)
    assert "not run" in claims_report(outcomes)


@pytest.mark.parametrize(
    "verdicts, status",
    [
        (["shown", "shown"], "shown"),
        (["shown", "contradicted"], "contradicted"),
        (["not shown", "shown"], "not shown"),
        (["shown", "not run"], "not run"),
        (["single seed, beyond the seed spread"], "not shown"),
        ([], "shown"),
    ],
)
def test_status_is_the_weakest_verdict(verdicts, status):
    assert (
        claim_status(Claim("c"), [Outcome(None, None, None, 0.0, None, None, verdict) for verdict in verdicts])
        == status
    )
    assert claim_status(Claim("c", needs="ImageNet"), []) == "needs ImageNet"
    assert claim_status(Claim("c", scope="at initialisation"), []) == "shown at initialisation"
