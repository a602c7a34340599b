"""hydra/launcher=slurm: a sweep's runs have the folders that train.py would give them."""

from __future__ import annotations

import pytest

from proxynorm.config import compose_config, multirun_first, settings_from
from proxynorm.errors import ConfigError
from proxynorm.reproduce.multirun import entries, launch
from proxynorm.train.settings import run_name


def test_each_point_is_a_run_with_the_words_of_its_command(tmp_path):
    words = [f"runs_dir={tmp_path}", "batch=32", "norm=bn"], [f"runs_dir={tmp_path}", "batch=32", "norm=ln"]
    runs = entries(words)
    assert [run.arguments for run in runs] == [tuple(point) for point in words]
    assert [run.folder for run in runs] == [
        tmp_path / run_name(settings_from(compose_config(point))) for point in words
    ]
    assert runs[0].log == tmp_path / "logs" / f"{runs[0].name}.log"


def test_two_points_in_one_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two runs of the sweep have the folder"):
        entries([["name=x", "seed=0"], ["name=x", "seed=1"]])


def test_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        launch([[f"runs_dir={tmp_path}"]], {"nodes": 2, "gpus": 3, "sbatch": []})
    assert ended.value.code == 2 and capsys.readouterr().err == "error: gpus=3: must be a multiple of nodes=2\n"


def test_the_m_may_stand_anywhere():
    assert multirun_first(["norm=bn,ln", "-m", "batch=2"]) == ["-m", "norm=bn,ln", "batch=2"]
    assert multirun_first(["norm=bn", "batch=2"]) == ["norm=bn", "batch=2"]
