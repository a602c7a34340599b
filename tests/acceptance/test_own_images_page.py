"""docs/your-own-images.md from its first command to its last, with published weights at hand."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from examples.own_images import draw_toy_images
from proxynorm.export import load
from tests.acceptance.docs_blocks import blocks, commands
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "your-own-images.md"
SMALL = "data.image_size=32 batch=4 epochs=2 max_steps=2 loader.workers=0 logger=none device=cpu"


def published(cache: Path) -> None:
    """Lay weights into the hub's cache, as a download would."""
    folder = cache / "models--timm--resnet50.a1_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    tensors = timm.create_model("resnet50").state_dict()
    save_file(tensors, folder / "snapshots" / ("0" * 40) / "model.safetensors")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    published(tmp_path / "hub")
    draw_toy_images(tmp_path / "DIR", train=4, val=2)
    draw_toy_images(tmp_path / "NEW", train=1, val=1)
    return tmp_path


def test_the_page_s_first_block_runs(place):
    environment = os.environ | {
        "HF_HUB_CACHE": str(place / "hub"),
        "PYTHONPATH": str(ROOT),
        "PROXYNORM_CACHE": str(place / "cache"),
    }
    words = commands(PAGE)[: blocks(PAGE)[0].text.count("python ")]
    assert len(words) == 6
    said = {}
    for _, script, *arguments in words:
        more = SMALL.split() if script in ("train.py", "scripts/doctor.py") else []
        command = [sys.executable, str(ROOT / script), *arguments, *more]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-2000:])
        said[script, arguments[0]] = done.stdout
    tensors = "started from timm: 318 of 320 tensors; new classifier for 3 classes"
    assert tensors in said["train.py", "name=head"]
    assert "320 of 320 tensors; classifier kept" in said["train.py", "name=mine"]
    assert json.loads(said["eval.py", "run=runs/mine"].splitlines()[-1])["count"] == 6
    rows = list(csv.DictReader(open(place / "runs/mine/predictions.csv")))
    assert len(rows) == 6 and {row["class_1"] for row in rows} <= {"blue", "green", "red"}
    assert (place / "runs/mine/evaluation/confusion.png").is_file()
    assert load(place / "runs/mine/export").inputs["classes"] == ["blue", "green", "red"]
