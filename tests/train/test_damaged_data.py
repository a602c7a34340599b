"""Training on a file that was damaged after it was written: it stops with one line, or skips the
damaged images and counts them."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.sources import list_source
from proxynorm.errors import ConfigError, DataError
from tests.data.conftest import needs_ffcv, remove_companions, write_folder
from tests.helpers import ROOT

pytestmark = needs_ffcv
TRAIN = ROOT / "train.py"
BAD = (2, 11, 17)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """train.beton with 36 images, three of them damaged after preparation, and val.beton with 12,
    one damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    photos = write_folder(folder / "photos", 12, 4)
    for part, rows in (("train", BAD), ("val", (5,))):
        prepare(list_source(photos / part), folder / f"{part}.beton", StorageOptions())
        samples = read_beton(folder / f"{part}.beton")
        with open(folder / f"{part}.beton", "r+b") as file:
            for row in rows:
                file.seek(int(samples.pointer[row]) + 400)
                file.write(b"\xff\xd9" * 20)
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        "data=beton",
        f"data.root={folder}",
        "data.image_size=32",
        "data.limit=null",
        "data.holdout=0",
        "batch=12",
        "eval_batch=5",
        "model.depth=8",
        "model.width=8",
        "epochs=2",
        *more,
    ]


def test_training_stops_with_one_line_that_names_the_image(damaged, tmp_path):
    arguments = overrides(damaged, "logger=none", f"runs_dir={tmp_path}", "device=cpu")
    done = subprocess.run(
        [sys.executable, str(TRAIN), *arguments], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert any(
        f"train.beton: image {row}: its stored bytes have changed" in errors[0] for row in BAD
    )
    assert "data.on_bad=skip" in errors[0]


def test_training_skips_and_counts_damaged_images(run_small, damaged):
    run = run_small(*overrides(damaged, "data.on_bad=skip"))
    assert run.status == 0
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["damaged_images"] == len(BAD) + 1
    assert summary["count"] == 11 and summary["steps"] == 6 and summary["completed"]
    assert all(row["count"] == 11 for row in run.rows if row["event"] == "eval")


def test_evaluation_skips_what_the_run_skipped(run_small, damaged, monkeypatch, capsys):
    run = run_small(*overrides(damaged, "data.on_bad=skip"))
    arguments = ["eval.py", f"run={run.folder}", "device=cpu"]
    for policy, code in ([], 0), (["on_bad=raise"], 2):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [*arguments, *policy])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TRAIN.with_name("eval.py")), run_name="__main__")
        shown = capsys.readouterr()
        assert end.value.code == code and shown.err.count("val.beton: image") == 1
        if not code:
            result = json.loads(shown.out.splitlines()[-1])
            assert result["count"] == 11 and result["top1"] == run.rows[-1]["top1"]
            assert shown.err.startswith("left out: ")


def test_training_and_evaluation_warn_of_files_without_manifest(
    run_small, damaged, tmp_path, monkeypatch, capsys
):
    """Their classes, labels and images cannot be compared with what was written."""
    folder = shutil.copytree(damaged, tmp_path / "bare")
    for part in ("train", "val"):
        remove_companions(folder / f"{part}.beton")
    told = f"warning: {folder}/train.beton: no manifest"
    run = run_small(*overrides(folder, "data.on_bad=skip", "max_steps=1"))
    assert run.status == 0 and capsys.readouterr().out.count(told) == 1
    monkeypatch.setattr(sys, "argv", ["eval.py", f"run={run.folder}", "device=cpu"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TRAIN.with_name("eval.py")), run_name="__main__")
    shown = capsys.readouterr()
    assert shown.err.count(told) == 1 and json.loads(shown.out)["count"] <= 12


def test_training_images_are_those_of_the_undamaged_file(damaged):
    """Bit for bit, and without the damaged ones."""
    from proxynorm.data import DataSpec, LoaderSpec, open_data

    prepare(
        list_source(damaged / "photos" / "train"),
        damaged / "whole" / "train.beton",
        StorageOptions(),
    )
    prepare(
        list_source(damaged / "photos" / "val"), damaged / "whole" / "val.beton", StorageOptions()
    )
    seen = []
    for root in (damaged, damaged / "whole"):
        data = open_data(
            DataSpec("beton", root=str(root), augmentation="inception", on_bad="skip"),
            LoaderSpec("ffcv", 1),
        )
        batches = list(data.train_loader(12, 12, seed=3).epoch(0))
        seen.append(
            {int(i): image for batch in batches for i, image in zip(batch.indices, batch.images)}
        )
    assert set(seen[1]) - set(seen[0]) == set(BAD)
    assert all(torch.equal(image, seen[1][index]) for index, image in seen[0].items())


@pytest.mark.parametrize(
    "more",
    [
        ("norm=ln_pn", "micro_batch=1"),
        ("regularization.mixup=0.5", "batch=2", "max_steps=18", "epochs=1"),
    ],
)
def test_a_run_survives_micro_batches_with_one_image_or_none(run_small, damaged, more):
    run = run_small(*overrides(damaged, "data.on_bad=skip", *more))
    assert run.status == 0
    assert json.loads((run.folder / "summary.json").read_text())["completed"]


def test_mixing_micro_batches_of_one_is_refused(run_small, damaged):
    more = ("data.on_bad=skip", "regularization.mixup=0.5", "micro_batch=1")
    with pytest.raises(ConfigError, match="micro_batch is 1; give a larger one"):
        run_small(*overrides(damaged, *more))


def test_an_evaluation_without_readable_images_is_one_line(run_small, damaged, tmp_path):
    folder = shutil.copytree(damaged, tmp_path / "all")
    samples = read_beton(folder / "val.beton")
    with open(samples.path, "r+b") as file:
        for pointer in samples.pointer:
            file.seek(int(pointer) + 300)
            file.write(b"\xff\xd9" * 20)
    with pytest.raises(DataError, match=r"val.beton.*: .*every evaluation image is damaged"):
        run_small(*overrides(folder, "data.on_bad=skip", "epochs=1"))
