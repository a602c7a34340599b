"""hydra/launcher=slurm: a sweep's runs have the folders that train.py would give them."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from hydra_plugins.slurm_launcher import CONFIG
from proxynorm.errors import ConfigError
from proxynorm.launch.multirun import launch, sweep_runs
from proxynorm.train.config import check_arguments, compose_config, settings_from
from proxynorm.train.settings import run_name


def test_each_point_is_a_run_with_the_words_of_its_command(tmp_path):
    words = (
        [f"runs_dir={tmp_path}", "batch=32", "norm=bn"],
        [f"runs_dir={tmp_path}", "batch=32", "norm=ln"],
    )
    runs = sweep_runs(words)
    assert [run.arguments for run in runs] == [tuple(point) for point in words]
    assert [run.folder for run in runs] == [
        tmp_path / run_name(settings_from(compose_config(point))) for point in words
    ]
    assert runs[0].log == tmp_path / "logs" / f"{runs[0].name}.log"


def test_two_points_in_one_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two runs of the sweep have the folder"):
        sweep_runs([["name=x", "seed=0"], ["name=x", "seed=1"]])


def test_the_point_that_cannot_be_built_is_named():
    with pytest.raises(ConfigError, match="^norm=ln batch=10 micro_batch=7: "):
        sweep_runs(
            [["norm=ln", "batch=7", "micro_batch=7"], ["norm=ln", "batch=10", "micro_batch=7"]]
        )


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Launches two seeds, the first of which was measured, where sbatch is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    points = [
        [f"runs_dir={tmp_path}/runs", f"seed={seed}", "data.limit=1000", "epochs=1", "batch=100"]
        for seed in (0, 1)
    ]
    measured = sweep_runs(points)[0].folder
    measured.mkdir(parents=True)
    (measured / "config.yaml").write_text(
        OmegaConf.to_yaml(compose_config(points[0]), resolve=True)
    )
    (measured / "environment.json").write_text('{"processor": "CPU", "gpus": []}')
    row = {
        "event": "train",
        "step": 3,
        "epoch": 0.3,
        "images": 300,
        "loss": 1.0,
        "images_per_second": 1.0,
    }
    (measured / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    def go(points=points, **options):
        with pytest.raises(SystemExit) as ended:
            launch(points, {"sbatch": [], **options})
        assert ended.value.code == 2

    return go


def test_a_multirun_is_estimated_before_it_is_submitted(sweep, tmp_path, capsys):
    sweep()
    said = capsys.readouterr()
    assert "2 runs to do, 35 min (measured)" in said.out and "sbatch not found" in said.err


def test_what_was_never_measured_is_of_unknown_time(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep([["runs_dir=elsewhere", "batch=100", "data.limit=1000"]], time="10")
    said = capsys.readouterr()
    assert (
        "time unknown (nothing like it was measured)" in said.out and "sbatch not found" in said.err
    )


def test_a_dry_run_submits_nothing(tmp_path, capsys):
    options = {key: value for key, value in CONFIG.items() if key != "_target_"}
    launch([[f"runs_dir={tmp_path}/runs"]], {**options, "dry_run": True, "time": "30"})
    assert " sbatch " in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        launch([[f"runs_dir={tmp_path}"]], {"nodes": 2, "gpus": 3, "sbatch": []})
    assert (
        ended.value.code == 2
        and capsys.readouterr().err == "error: gpus=3: must be a multiple of nodes=2\n"
    )


def test_the_m_may_stand_anywhere():
    assert check_arguments(["norm=bn,ln", "-m", "batch=2"]) == ["-m", "norm=bn,ln", "batch=2"]
    assert check_arguments(["norm=bn", "batch=2"]) == ["norm=bn", "batch=2"]
