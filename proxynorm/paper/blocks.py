"""Tables of results in Markdown files, between <!-- table NAME --> and <!-- end -->."""

from __future__ import annotations

import re
from pathlib import Path

from proxynorm.analysis.tables import markdown_table
from proxynorm.paper.compare import span
from proxynorm.paper.findings import gather
from proxynorm.paper.report import wide_table
from proxynorm.paper.table import load_table, reported_runs

BLOCK = re.compile(r"(<!-- table (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(text: str, results: Path) -> str:
    """The text of a Markdown file with its tables replaced by those of results/NAME.

    Raises ConfigError for a block of an unknown table.
    """
    return BLOCK.sub(
        lambda match: f"{match[1]}\n{result_table(match['name'], results)}\n\n{match[3]}", text
    )


def result_table(name: str, results: Path) -> str:
    """The table's cells, mean ± standard deviation and seeds, from its kept runs alone."""
    table = load_table(name)
    runs = reported_runs(table, results / "no run folders", results)
    findings = gather(table, runs, results)
    if not findings.records:
        return "No run is kept yet."
    counts = sorted({sample.n for sample in findings.samples.values()})
    note = f"{table.metric} (%) on {table.split}, mean ± standard deviation, "
    note += f"{span(counts)} seeds a cell."
    return f"{markdown_table(wide_table(findings))}\n\n{note}"
