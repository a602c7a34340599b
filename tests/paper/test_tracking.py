"""What W&B gets beside the runs: a comparison, and kept runs; read back from its offline files."""

import shutil

import pytest

from proxynorm.cli import parse_options
from proxynorm.commands.reproduce import Options, main
from proxynorm.errors import ConfigError
from proxynorm.paper.findings import gather
from proxynorm.paper.records import collect
from proxynorm.paper.report import write_report
from proxynorm.paper.table import table_runs
from proxynorm.paper.tracking import log_comparison
from tests.tiny_table import write_run
from tests.wandb_files import read_offline


@pytest.fixture
def finished(tiny, tmp_path):
    """The tiny table's runs, finished, with powers."""
    runs = table_runs(tiny, tmp_path / "runs")
    power = {f"p{term}/{layer}": 0.25 for term in (1, 2, 3, 4) for layer in ("a", "b")}
    for run, top1 in zip(runs, (90.0, 91.0, 90.2, 91.4), strict=True):
        write_run(run, top1, power=power)
    return runs


def test_a_report_is_a_comparison_run_with_tables_and_figures(tiny, finished, tmp_path):
    findings = gather(tiny, finished, tmp_path)
    write_report(findings, tmp_path / "report")
    log_comparison(findings, "offline", tmp_path / "report", tmp_path / "logged")
    found = read_offline(tmp_path / "logged")
    assert (found["name"], found["group"], found["job"]) == (
        "tiny-comparison",
        "tiny",
        "comparison",
    )
    assert found["config"] >= {"table", "metric", "seeds", "protocol", "runs", "cells"}
    figures = {"figure/cells", "figure/curves", "figure/power", "figure/power_epochs"}
    assert found["history"] >= {"comparison", "cells", "claims"} | figures
    assert found["summary"] >= {"verdict", "mean/bn"}


def test_a_report_of_a_selection_has_a_name_of_its_own(tiny, finished, tmp_path):
    words = [f"table={tiny.file}", f"root={tmp_path}/runs", f"results={tmp_path}/results"]
    words += ["wandb=offline", "cells=[bn]", "seeds=1"]
    assert main(parse_options(Options, ["command=report", *words])) == 0
    found = read_offline(tmp_path / "runs" / "tiny")
    assert found["name"] == 'tiny-comparison seeds=1 cells=["bn"]' and found["group"] == "tiny"


def test_archived_runs_are_uploaded_once_in_the_group_of_their_table(
    tiny, finished, tmp_path, capsys
):
    results = tmp_path / "results"
    for run in finished[:2]:
        collect(run, results)
    shutil.rmtree(tmp_path / "runs")
    words = ["command=upload", f"table={tiny.file}", f"root={tmp_path}/runs", "wandb=offline"]
    options = parse_options(Options, [*words, f"results={results}"])
    for count in (2, 0):
        assert main(options) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{count} runs uploaded") and ("W&B's files" in said) == (count > 0)
    found = read_offline(tmp_path / "runs" / "tiny" / "upload" / "ln_pn-s0")
    assert (found["name"], found["group"], found["job"]) == ("ln_pn-s0", "tiny", "train")
    assert {"norm=ln_pn", "model=resnet20v2", "batch=64", "table=tiny"} <= set(found["tags"])
    assert found["history"] >= {"train/loss", "eval/top1", "power/p1_mean", "power/decomposition"}
    assert not any(key.startswith("power/p1/") for key in found["history"])
    assert "top1" in found["summary"] and "norm" in found["config"]


@pytest.mark.parametrize("fault", [RuntimeError("no\ngood"), TypeError("x"), OSError("disk")])
def test_whatever_fails_in_wandb_leaves_the_report(tiny, tmp_path, monkeypatch, capsys, fault):
    def init(**options):
        raise fault

    monkeypatch.setattr("wandb.init", init)
    log_comparison(gather(tiny, [], tmp_path), "offline", tmp_path, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith(f"warning: tiny-comparison is not on W&B: {type(fault).__name__}: ")
    assert said.count("\n") == 1


def test_an_unknown_mode_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="logger.mode"):
        log_comparison(gather(tiny, [], tmp_path), "ofline", tmp_path, tmp_path)
