"""A sweep ends in an answer: a table with ± and differences to bn, comparison.md, figures, W&B."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from hydra_plugins.proxynorm_launchers import LocalLauncher
from proxynorm.launch.multirun import sweep_runs
from proxynorm.paper.sweep import as_table, write_comparison
from tests.helpers import ROOT, SMALL
from tests.tiny_table import write_run
from tests.wandb_files import read_offline

TOP1 = {"bn": (50.0, 52.0), "ln": (40.0, 41.0), "ln_pn": (50.5, 51.5)}


@pytest.fixture
def runs(tmp_path):
    """The finished runs of three norms and two seeds, in one folder."""
    points = [
        ["batch=32", f"norm={norm}", f"seed={seed}", f"runs_dir={tmp_path}", "logger=none"]
        for norm in TOP1
        for seed in (0, 1)
    ]
    runs = sweep_runs(points)[0]
    for run, (norm, seed) in zip(runs, [(norm, seed) for norm in TOP1 for seed in (0, 1)]):
        write_run(as_table([run], "sweep")[1][0], TOP1[norm][seed])
    return runs


def test_the_table_shows_mean_spread_n_and_the_difference_to_bn(runs, tmp_path):
    text = write_comparison(runs, tmp_path, "sweep-norm", "train.py -m …", "- batch=7: too small")
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[0] == "top1 % n minus bn 95 % interval"
    assert rows[2] == "bn 51.00 ± 1.41 2" and rows[4].startswith("ln_pn 51.00 ± 0.71 2 +0.00 -")
    assert rows[3].startswith("ln 40.50 ± 0.71 2 -10.50 -")
    report = (tmp_path / "comparison.md").read_text()
    assert report.startswith("# train.py -m …\n")
    assert "| ln_pn | 51.00 ± 0.71 | 2 | +0.00 |" in report
    assert "- batch=7: too small" in report and str(tmp_path / "comparison.md") in text
    for name in ("cells.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 1000 and f"]({name})" in report


def test_the_comparison_is_logged_in_the_group_of_its_runs(runs, tmp_path):
    online = [replace(run, arguments=(*run.arguments, "logger=wandb")) for run in runs]
    write_comparison(online, tmp_path, "sweep-norm", "train.py -m …")
    logged = read_offline(tmp_path)
    assert (logged["group"], logged["job"]) == ("sweep-norm", "comparison")
    assert {"comparison", "figure/cells", "figure/curves"} <= logged["history"]


def test_unfinished_runs_are_left_out(runs, tmp_path):
    (runs[-1].folder / "summary.json").unlink()
    assert "\nln_pn         50.50  1     -0.50\n" in write_comparison(runs, tmp_path, "sweep", "x")
    for run in runs[:-1]:
        (run.folder / "summary.json").unlink()
    assert write_comparison(runs, tmp_path, "sweep", "x") == ""


def test_another_sweep_in_the_folder_loses_nothing(runs, tmp_path):
    write_comparison(runs, tmp_path, "sweep", "first")
    write_comparison(runs, tmp_path, "sweep", "first")
    write_comparison(runs[:2], tmp_path, "sweep", "second")
    assert (tmp_path / "comparison.md").read_text().startswith("# second\n")
    former = tmp_path / "comparison-1"
    assert (former / "comparison.md").read_text().startswith("# first\n")
    assert (former / "curves.png").exists() and not (tmp_path / "comparison-2").exists()


def test_the_group_is_named_after_what_is_swept(tmp_path, monkeypatch):
    task = ["norm=bn,ln", "logger.tags=[a,b]", "data.root='x,y'", "batch=range(8,32,8)", "seed=0,1"]
    given = {"overrides": {"hydra": [], "task": task}, "sweep": {"dir": str(tmp_path)}}
    launcher = LocalLauncher()
    config = OmegaConf.create({"hydra": given, "logger": {"group": None}})
    launcher.setup(config=config)
    assert launcher.name == "sweep-norm-batch"
    assert launcher.command.startswith("python train.py -m norm=bn,ln 'logger.tags=[a,b]' ")
    monkeypatch.setattr("sys.argv", ["proxynorm train"])
    launcher.setup(config=config)
    assert launcher.command.startswith("proxynorm train -m norm=bn,ln ")


def test_axes_are_the_keys_that_vary_except_the_seed(tmp_path):
    points = [
        [f"batch={batch}", "norm=gn", f"seed={seed}", f"data.root='1_{batch}'"]
        for batch in (8, 16)
        for seed in (3, 4)
    ]
    table, runs = as_table(sweep_runs(points)[0], "sweep")
    assert runs[0].cell.labels == {"batch": 8, "data.root": "1_8"} and runs[1].seed == 4
    assert (table.rows, table.seeds) == (["batch", "data.root"], 2)
    table, runs = as_table(sweep_runs([["seed=1"], ["seed=2"]])[0], "sweep")
    assert [cell.name for cell in table.expand()] == ["ln_pn"] and table.seeds == 2


@pytest.mark.slow
def test_a_sweep_from_the_command_line(tmp_path):
    """A batch larger than the data fails, and the other is trained and compared."""
    small = [word for word in SMALL if word.partition("=")[0] not in ("batch", "epochs")]
    words = [*small, "epochs=1", "batch=500,20", f"runs_dir={tmp_path}/a=b"]
    done = subprocess.run(
        [sys.executable, "train.py", "-m", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"^batch20 +[\d.]+ +1$", done.stdout, re.MULTILINE)
    assert "1 of 2 runs failed:\n- batch=500: batch=500 exceeds the 200" in done.stdout
    assert (tmp_path / "a=b" / "comparison.md").exists()
