"""The README's commands compose, and the files that it names exist."""

from __future__ import annotations

import re

import pytest

from proxynorm.train.config import check_arguments
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


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
