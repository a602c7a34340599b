"""The table of claims names tests and comparisons that exist; its status follows from them."""

import json

import pytest

from proxynorm.commands.reproduce import Options, claims
from proxynorm.paper.claims import Claim, claim_status, claims_report, evidence, load_claims
from proxynorm.paper.compare import Outcome, Sample
from proxynorm.paper.findings import gather
from proxynorm.paper.report import result_table
from proxynorm.paper.table import load_table, table_names
from tests.helpers import ROOT

RESULTS = ROOT / "results"


def outcomes_without_runs():
    tables = {name: load_table(name) for claim in load_claims() for name in claim.tables}
    return {name: gather(table, [], RESULTS).outcomes for name, table in tables.items()}


def test_claims_name_tests_that_exist():
    source = (ROOT / "tests/acceptance/test_claims.py").read_text()
    named = {name for claim in load_claims() for name in claim.tests}
    assert all(f"def {name}(" in source for name in named)


def test_every_claim_has_evidence_or_says_what_it_needs():
    assert all(claim.tests or claim.comparisons or claim.needs for claim in load_claims())


def test_claims_name_comparisons_that_exist():
    assert "not run" in claims_report(outcomes_without_runs())


def test_every_comparison_of_the_small_tables_belongs_to_a_claim():
    """None is left out, whatever it says."""
    named = {item for claim in load_claims() for item in claim.comparisons}
    for name in table_names():
        if name.startswith("mini_"):
            pairs = {
                f"{name}: {item.first} - {item.second}" for item in load_table(name).comparisons
            }
            assert pairs <= named, pairs - named


def test_notes_quote_the_random_nets_that_are_kept():
    nets = json.loads((RESULTS / "power_random_net" / "summary.json").read_text())
    mean, each = nets["largest_distance_of_ln_from_mean_field"].values()
    text = claims_report(outcomes_without_runs())
    assert f"({nets['width']:,} channels, {nets['depth']} layers): P1 of LN strays" in text
    assert f"by at most {mean:.3f} in the mean of {nets['nets']} nets" in text
    assert f"of a single net by up to {max(each):.3f}" in text
    assert f"P1 at most {nets['largest_p1']['ln_pn']:.3f}." in text


def test_notes_quote_p1_of_the_report_of_mini_norms():
    report = (RESULTS / "mini_norms" / "report.md").read_text().split("## Power")[1]
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    ln, ln_pn = (next(row[2:4] for row in rows if row[0] == norm) for norm in ("ln", "ln_pn"))
    words = f"{ln_pn[0]} before training and {ln_pn[1]} after, that of LN {ln[0]} and {ln[1]}"
    assert words in claims_report(outcomes_without_runs())


@pytest.mark.parametrize(
    "verdicts, status",
    [
        (["shown", "shown"], "shown"),
        (["shown", "contradicted"], "contradicted"),
        (["not shown", "shown"], "not shown"),
        (["not run", "not run"], "not run"),
        (["shown", "not run"], "shown; in part not run"),
        (["contradicted", "not run"], "contradicted; in part not run"),
        (["single seed, beyond the seed spread", "shown"], "undecided: one seed"),
        (["single seed, spread unknown", "not shown"], "not shown"),
        ([], "shown"),
    ],
)
def test_status_is_the_weakest_verdict(verdicts, status):
    assert (
        claim_status(Claim("c"), [Outcome(None, None, None, verdict, 0.0) for verdict in verdicts])
        == status
    )
    assert claim_status(Claim("c", needs="ImageNet"), []) == "needs ImageNet"
    interim = Outcome(None, None, None, "shown", 0.0, is_interim=True)
    assert claim_status(Claim("c"), [interim]) == "shown so far"
    assert claim_status(Claim("c", scope="at initialisation"), []) == "shown at initialisation"


def test_the_reason_stands_beside_a_claim_that_is_not_shown():
    claim = Claim("c", comparisons=["t: a - b"], reason="too short")
    sample = Sample((1.0, 2.0))

    def evidence_with(verdict):
        return evidence(claim, [Outcome(None, sample, sample, verdict, 0.0, p=0.5)])

    assert evidence_with("contradicted").endswith("; why: too short")
    assert "why" not in evidence_with("shown")


def test_a_tuned_table_whose_search_has_not_chosen_counts_as_not_run(tmp_path, monkeypatch):
    """In the table of claims and in documents: its kept runs may be of other rates."""
    monkeypatch.setattr("proxynorm.paper.table.SHIPPED", tmp_path / "none")
    (tmp_path / "mini_norms").symlink_to(RESULTS / "mini_norms")
    item = "mini_norms: ln_pn - bn"
    claim = next(claim for claim in load_claims() if item in claim.comparisons)

    def row() -> str:
        claims(Options(command="claims", root=str(tmp_path / "none"), results=str(tmp_path)))
        return next(
            line
            for line in (tmp_path / "claims.md").read_text().splitlines()
            if claim.claim in line
        )

    assert f"{item}: not run" in row()
    assert result_table("mini_norms", tmp_path) == "No run is kept yet."
    (tmp_path / "mini_search").symlink_to(RESULTS / "mini_search")
    assert f"{item}: not run" not in row()
    assert "seeds a cell" in result_table("mini_norms", tmp_path)
