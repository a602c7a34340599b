"""Tables of results in Markdown files, between <!-- table NAME --> and <!-- end -->."""

from __future__ import annotations

import re
from pathlib import Path

from proxynorm.analysis.tables import markdown_table
from proxynorm.errors import DataError
from proxynorm.files import write_text
from proxynorm.paper.compare import span
from proxynorm.paper.findings import gather
from proxynorm.paper.report import wide_table
from proxynorm.paper.table import load_table, reported_runs, table_names

BLOCK = re.compile(r"(<!-- table (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render_blocks(path: Path, results: Path) -> bool:
    """Replace the tables in a Markdown file by those of results/NAME; whether any changed.

    Raises DataError for a block of an unknown table.
    """
    text = path.read_text()
    new = rendered(text, path, results)
    if new != text:
        write_text(path, new)
    return new != text


def rendered(text: str, path: Path, results: Path) -> str:
    """The text with its blocks rendered anew."""

    def render(match: re.Match) -> str:
        if match["name"] not in table_names():
            raise DataError(f"{path}: no table '{match['name']}'")
        return f"{match[1]}\n{result_table(match['name'], results)}\n\n{match[3]}"

    return BLOCK.sub(render, text)


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
