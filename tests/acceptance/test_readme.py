"""The README: its measured blocks come from results/, its commands exist."""

from __future__ import annotations

import re

import pytest

from proxynorm.errors import DataError
from proxynorm.paper.readme import BLOCK, render, stale
from proxynorm.train.config import check_arguments
from scripts import readme as script
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


def test_blocks_are_rendered_from_results():
    assert len(BLOCK.findall(README)) >= 1
    assert render(README, ROOT / "results") == README


def test_a_changed_number_is_found():
    name = BLOCK.search(README)["body"]
    digit = re.search(r"\d\.\d", name)[0]
    assert render(README.replace(digit, "9.9", 1), ROOT / "results") == README


def test_the_blocks_that_differ_are_named_and_the_command_that_mends_them(tmp_path, monkeypatch):
    changed = README.replace("<!-- end of demo -->", "by hand\n<!-- end of demo -->")
    assert stale(README, ROOT / "results") == [] and stale(changed, ROOT / "results") == ["demo"]
    (tmp_path / "README.md").write_text(changed)
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    with pytest.raises(
        DataError,
        match=rf"^{tmp_path}/README.md: demo differ from results/; python scripts/readme.py renders",
    ):
        script.main(script.Options(check=True))
    assert script.main(script.Options()) == 0 and (tmp_path / "README.md").read_text() == README


def test_an_unknown_block_is_refused():
    with pytest.raises(DataError, match="nothing renders"):
        render("<!-- elsewhere: x -->\n1\n<!-- end of elsewhere -->", ROOT / "results")


@pytest.mark.parametrize(
    "line",
    [
        line
        for line in README.splitlines()
        if re.match(r"(python|torchrun \S+ \S+) train\.py", line)
    ],
)
def test_training_commands_compose(line):
    arguments = line.split("#")[0].split("train.py", 1)[1].split()
    check_arguments([argument.replace("DIR", "somewhere") for argument in arguments])


def test_named_files_exist():
    for path in re.findall(r"(?:bash|python) ((?:scripts/)?[a-z_]+\.(?:sh|py))", README):
        assert (ROOT / path).exists(), path
    for folder in re.findall(r"^\| `([a-z/]+)/` \|", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
