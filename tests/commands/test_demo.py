"""The demo without its training: what it draws, prints last, keeps and logs."""

import pytest

from proxynorm.cli import parse_options
from proxynorm.commands import demo
from tests.launch.conftest import stand_in, tiny  # noqa: F401
from tests.wandb_files import read_offline


@pytest.fixture
def run_demo(tiny, stand_in, tmp_path, monkeypatch):  # noqa: F811
    """Run the demo on the tiny table in tmp_path."""
    monkeypatch.setattr(demo, "load_table", lambda name, seeds: tiny)
    monkeypatch.setitem(demo.SIZES, "width", 8)
    monkeypatch.setitem(demo.SIZES, "depth", 3)

    def run(*words):
        words = [*words, f"root={tmp_path}/runs", f"results={tmp_path}/results"]
        return demo.main(parse_options(demo.Options, words))

    return run


def test_it_ends_in_a_table_figures_and_a_comparison_on_wandb(run_demo, tmp_path, capsys):
    assert run_demo("wandb=offline") == 0
    said = capsys.readouterr().out
    assert said.index("P1 at depth 3") < said.index("Training 4 networks") < said.index("minus bn")
    report = tmp_path / "runs" / "tiny" / "report"
    assert {"report.md", "cells.png", "cells.pdf", "table.tex"} <= {
        p.name for p in report.iterdir()
    }
    assert (tmp_path / "runs" / "tiny" / "random_nets" / "p1.png").is_file()
    found = read_offline(tmp_path / "runs" / "tiny")
    assert found["name"] == "tiny-comparison" and found["group"] == "tiny"
    assert found["history"] >= {"comparison", "claims", "figure/cells", "figure/curves"}


def test_a_second_demo_has_the_same_verdict_and_record_keeps_the_runs(run_demo, tmp_path, capsys):
    assert run_demo("wandb=disabled") == 0
    first = capsys.readouterr().out.splitlines()
    assert run_demo("wandb=disabled", "record=true") == 0
    assert capsys.readouterr().out.splitlines()[-1] == first[-1]
    kept = tmp_path / "results" / "tiny"
    assert len(list((kept / "runs").glob("*.tar.xz"))) == 4 and (kept / "report.md").is_file()


def test_an_installed_demo_names_the_installed_command(run_demo, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["proxynorm demo"])
    assert run_demo("wandb=disabled") == 0
    said = capsys.readouterr().out
    assert "  proxynorm train norm=gn_pn" in said and ".py" not in said.partition("What next")[2]
