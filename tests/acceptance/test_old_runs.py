"""A run folder, a checkpoint and an export made by version 0.1.0 stay usable."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from proxynorm.train import checkpoint
from proxynorm.train.run_folder import read_metrics
from tests.data.conftest import needs_fashion_mnist
from tests.helpers import ROOT

OLD = ROOT / "tests" / "fixtures" / "run_v1"
OVERRIDES = (
    "model.depth=8 model.width=8 data.limit=200 data.holdout=100 batch=20 epochs=2 log_every=1 "
    "schedule.warmup_epochs=0.2 norm.groups=4 norm=ln_pn logger=none name=run_v1"
).split()
pytestmark = needs_fashion_mnist


@pytest.fixture
def old_run(tmp_path):
    return shutil.copytree(OLD, tmp_path / "run_v1")


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_old_run_evaluates_to_the_same_numbers(old_run):
    result = json.loads(command("eval.py", f"run={old_run}").splitlines()[-1])
    assert result == pytest.approx(json.loads((OLD / "evaluation.json").read_text()))


def test_an_old_run_resumes_as_if_it_had_never_stopped(old_run):
    command("train.py", *OVERRIDES, f"runs_dir={old_run.parent}", "resume=must")
    resumed, unbroken = (
        [row for row in read_metrics(path) if row["event"] == "train"]
        for path in (old_run / "metrics.jsonl", OLD / "unbroken_metrics.jsonl")
    )
    assert [row["step"] for row in resumed] == [row["step"] for row in unbroken]
    # other CPUs round differently, and rounding grows from step to step on these images
    for row, expected in zip(resumed[:10], unbroken[:10], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_an_old_run_exports_the_same_weights(old_run):
    command("scripts/export.py", f"run={old_run}")
    exported = load_file(old_run / "export" / "model.safetensors")
    stored = checkpoint.load(OLD / "checkpoints" / "last.pt")["model"]
    assert all(torch.equal(exported[name], stored[name]) for name in stored)


def test_an_old_export_still_loads():
    from proxynorm.export import load

    stored = checkpoint.load(OLD / "checkpoints" / "last.pt")["model"]
    loaded = load(OLD / "export").model.state_dict()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
