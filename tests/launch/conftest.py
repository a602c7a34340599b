"""The tiny table and the stand-in for train.py as fixtures."""

import json
import sys
import textwrap
from dataclasses import replace

import pytest

from proxynorm.launch import local as launch
from proxynorm.paper.table import load_table, table_runs
from tests.tiny_table import STAND_IN, TINY, write_run


@pytest.fixture
def tiny(tmp_path):
    """The tiny table."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return load_table(str(path))


@pytest.fixture
def stand_in(tiny, tmp_path, monkeypatch):
    """Replace train.py; the returned function sets what named runs do.

    A finished one gets the files of finished/NAME.
    """
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(launch, "TRAIN", (sys.executable, str(script)))
    (tmp_path / "runs").mkdir(exist_ok=True)
    for run in table_runs(tiny, tmp_path / "runs"):
        write_run(replace(run, folder=tmp_path / "runs" / "finished" / run.name), 50.0)

    def plan(**runs):
        (tmp_path / "runs" / "plan.json").write_text(
            json.dumps({name.replace("__", "-"): what for name, what in runs.items()})
        )

    plan()
    return plan
