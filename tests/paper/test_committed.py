"""The committed reports in results/ are those of the committed runs, byte for byte."""

import filecmp

from proxynorm.paper.claims import claims_report, load_claims
from proxynorm.paper.findings import gather
from proxynorm.paper.report import write_report
from proxynorm.paper.table import load_table, reported_runs, table_names
from tests.helpers import ROOT

RESULTS = ROOT / "results"


def committed(name, nowhere):
    table = load_table(name)
    return gather(table, reported_runs(table, nowhere, RESULTS), RESULTS)


def test_reports_are_rebuilt_to_the_byte(tmp_path):
    for name in table_names():
        if (RESULTS / name / "report.md").is_file():
            write_report(committed(name, tmp_path / "no runs"), tmp_path / name)
            names = sorted(path.name for path in (tmp_path / name).iterdir())
            match, mismatch, errors = filecmp.cmpfiles(
                RESULTS / name, tmp_path / name, names, shallow=False
            )
            assert match == names, f"{name}: {mismatch + errors}"


def test_the_table_of_claims_is_rebuilt_to_the_byte(tmp_path):
    if (RESULTS / "claims.md").is_file():
        tables = {name for claim in load_claims() for name in claim.tables}
        outcomes = {name: committed(name, tmp_path).outcomes for name in tables}
        assert (RESULTS / "claims.md").read_text() == claims_report(outcomes)
