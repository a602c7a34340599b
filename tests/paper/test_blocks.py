"""Tables of results in Markdown files."""

import pytest

from proxynorm.errors import ConfigError
from proxynorm.paper.report import rendered
from tests.helpers import ROOT

RESULTS = ROOT / "results"


def test_committed_blocks_are_current():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text()
        assert rendered(text, RESULTS) == text, f"python scripts/reproduce.py docs: {path}"


def test_a_block_is_replaced_by_the_table_and_the_rest_stays():
    text = rendered("before\n<!-- table demo -->\nold\n<!-- end -->\nafter\n", RESULTS)
    assert rendered(text, RESULTS) == text
    lines = text.splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "| bn | 85.47 ± 0.54 |" in lines
    assert "top1 (%) on the test set, mean ± standard deviation, 3 seeds a cell." in lines


def test_an_unknown_table_is_refused():
    with pytest.raises(ConfigError, match="no table 'nowhere'"):
        rendered("<!-- table nowhere -->\n<!-- end -->\n", RESULTS)
