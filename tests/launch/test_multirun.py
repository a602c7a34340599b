"""Sweeps: each run in the folder that train.py gives it, here one by one or submitted to SLURM."""

from __future__ import annotations

import json
import sys

import pytest
from omegaconf import OmegaConf

from hydra_plugins.proxynorm_launchers import SLURM, LocalLauncher, SlurmLauncher
from proxynorm.errors import ConfigError
from proxynorm.launch import local, multirun
from proxynorm.launch.multirun import sweep_runs, train_here
from proxynorm.train.config import check_arguments, compose_config, settings_from
from proxynorm.train.settings import run_name


def test_each_point_is_a_run_with_its_overrides(tmp_path):
    words = (
        [f"runs_dir={tmp_path}", "batch=32", "norm=bn"],
        [f"runs_dir={tmp_path}", "batch=32", "norm=ln"],
    )
    runs, failures = sweep_runs(words)
    assert not failures
    assert [run.arguments for run in runs] == [tuple(point) for point in words]
    assert [run.folder for run in runs] == [
        tmp_path / run_name(settings_from(compose_config(point))) for point in words
    ]
    assert runs[0].log == tmp_path / "logs" / f"{runs[0].name}.log"


def test_two_points_in_one_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two runs of the sweep have the folder"):
        sweep_runs([["name=x", "seed=0"], ["name=x", "seed=1"]])
    with pytest.raises(ConfigError, match="sweep them apart, by runs_dir="):
        sweep_runs([["data=folder", "data.root=/a"], ["data=folder", "data.root=/b"]])


def test_the_point_that_cannot_be_built_is_named():
    points = [["norm=ln", "batch=7", "micro_batch=7"], ["norm=ln", "batch=10", "micro_batch=7"]]
    runs, (failure,) = sweep_runs(points)
    assert len(runs) == 1 and failure.status == 2
    assert (failure.overrides, failure.reason[:30]) == (
        "batch=10",
        "batch=10 is not divisible by m",
    )
    with pytest.raises(ConfigError, match="^batch=10: batch=10 is not divisible"):
        SlurmLauncher(sbatch=[]).run(points)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Launches two seeds, the first of which was measured, where sbatch is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    points = [
        [f"runs_dir={tmp_path}/runs", f"seed={seed}", "data.limit=1000", "epochs=1", "batch=100"]
        for seed in (0, 1)
    ]
    measured = sweep_runs(points)[0][0].folder
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
        with pytest.raises(ConfigError, match="sbatch not found"):
            SlurmLauncher(sbatch=[], **options).run(points)

    return go


def test_a_multirun_is_estimated_before_it_is_submitted(sweep, tmp_path, capsys):
    sweep()
    assert "2 runs to do, 35 min (measured)" in capsys.readouterr().out


def test_the_time_of_an_unmeasured_run_is_unknown(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep([["runs_dir=elsewhere", "batch=100", "data.limit=1000"]], time="10")
    assert "time unknown (nothing like it was measured)" in capsys.readouterr().out


def test_a_dry_run_submits_nothing(tmp_path, capsys):
    options = {**SLURM, "dry_run": True, "time": "30"}
    SlurmLauncher(**options).run([[f"runs_dir={tmp_path}/runs"]])
    assert " sbatch " in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_impossible_resources_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="gpus=3: must be a multiple of nodes=2"):
        SlurmLauncher(nodes=2, gpus=3, sbatch=[]).run([[f"runs_dir={tmp_path}"]])


def test_the_option_m_may_be_anywhere():
    assert check_arguments(["norm=bn,ln", "-m", "batch=2"]) == ["-m", "norm=bn,ln", "batch=2"]
    assert check_arguments(["norm=bn", "batch=2"]) == ["norm=bn", "batch=2"]


STAND_IN = """
import os, signal, sys, time
print("trains", *sys.argv[1:], os.environ["TORCHELASTIC_RESTART_COUNT"])
if "batch=100" in sys.argv:
    sys.exit("Traceback …\\nValueError: no\\nerror: the run in x ended with the fault above")
if "batch=101" in sys.argv:
    print("error: batch=101 is too large", file=sys.stderr)
    sys.exit(2)
if "batch=102" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
if "batch=103" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """Sweeps over batch sizes with a stand-in for train.py; returns (failures, output)."""
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(local, "TRAIN", (sys.executable, str(script)))

    def go(*batches, more=()):
        points = [[f"batch={batch}", "seed=1", *more] for batch in batches]
        failures = train_here(points)[1]
        return failures, "".join(capfd.readouterr())

    return go


def test_a_sweep_goes_on_after_failures(here):
    failures, said = here(100, 102, 101, 8)
    assert said.count("trains") == 4 and "[4/4] batch=8\n" in said
    assert said.count("ended with the fault above") == 1  # printed by the run itself
    assert failures == [
        ("batch=100", 1, "ValueError: no"),
        ("batch=102", -9, "killed (signal 9); run again"),
        ("batch=101", 2, "batch=101 is too large"),
    ]


def test_a_run_that_cannot_be_built_is_one_of_the_failures(here):
    failures, said = here(10, 9, more=["micro_batch=3"])
    assert said.count("trains") == 1 and [failure.status for failure in failures] == [2]
    assert "left out: batch=10: batch=10 is not divisible by micro_batch=3" in said


@pytest.mark.parametrize(("statuses", "expected"), [([], 0), ([2, 2], 2), ([2, 1], 1), ([-9], 1)])
def test_a_sweep_s_status_is_2_for_the_user_s_mistakes_alone(monkeypatch, statuses, expected):
    failures = [multirun.Failure("batch=1", status, "no") for status in statuses]
    monkeypatch.setattr(multirun, "train_here", lambda sweep: ([], failures))
    assert LocalLauncher().run([["batch=1"]]) == expected


def test_each_run_of_a_sweep_has_its_own_restart_count(here, monkeypatch):
    """torchrun's processes meet in one store, in which an earlier run's addresses remain."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    said = here(7, 101)[1]
    assert "batch=7 seed=1 2.1\n" in said and "batch=101 seed=1 2.2\n" in said


def test_a_signal_ends_the_sweep_with_its_run(here, capfd):
    with pytest.raises(SystemExit) as ended:
        here(103, 8)
    assert ended.value.code == 75 and capfd.readouterr().out.count("trains") == 1
