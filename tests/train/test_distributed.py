"""Several processes under torchrun (gloo): same training, exact evaluation and resumption."""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from proxynorm.nn import NormAct2d, inductor_options
from proxynorm.train import checkpoint
from proxynorm.train.run_folder import read_metrics
from tests.helpers import ROOT, SMALL, assert_same_run
from tests.same_run import differences

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(processes: int, runs: Path, *overrides: str, restarts: int = 0) -> list[str]:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
    ]
    return [sys.executable, *launcher, "train.py", *SMALL, f"runs_dir={runs}", *overrides]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def read(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(
        folder=folder,
        rows=read_metrics(folder / "metrics.jsonl"),
        last=checkpoint.load(folder / "checkpoints" / "last.pt"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_as_one(run_small, tmp_path, processes):
    """Same losses to rounding, and each of 101 evaluation images once."""
    options = ("data.holdout=101", "micro_batch=5", "regularization=none")
    one = run_small(*options, "name=one")
    result = run(torchrun(processes, tmp_path, *options, "name=several"))
    assert result.returncode == 0, result.stderr
    several = read(tmp_path / "several")
    for first, second in zip(one.rows, several.rows, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)
    assert several.rows[-1]["count"] == 101
    assert f"{processes} × {4 // processes} × 5" in result.stdout
    assert result.stdout.count("top-1") == 1


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path):
    """torchrun restarts a killed worker; the run ends with the bits of an uninterrupted one."""
    options = (
        "norm=bn",
        "micro_batch=5",
        "regularization=extra",
        "regularization.ema_decay=0.9",
        "checkpoint.every_steps=4",
        "log_every=3",
    )
    whole = run(torchrun(2, tmp_path, *options, "name=whole"))
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        torchrun(2, tmp_path, *options, "name=cut", restarts=2),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "cut" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) >= 3)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "RuntimeError" not in errors, errors
    assert "resumed at step" in output
    assert_same_run(read(tmp_path / "whole"), read(tmp_path / "cut"))


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.mark.slow
def test_user_error_in_every_process_is_status_2(tmp_path):
    result = run(torchrun(2, tmp_path, "batch=25"))
    assert result.returncode != 0
    assert "batch=25 is not divisible by 2 processes × micro_batch=12" in result.stderr


@pytest.mark.slow
def test_the_fault_of_one_process_ends_all_with_its_message(tmp_path):
    """One process meets a damaged image: one line from each, none about a lost connection."""
    for path in (
        tmp_path / "data" / split / name / f"{i}.png"
        for split in ("train", "val")
        for name in "ab"
        for i in range(10)
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 60).convert("RGB").save(path)
    damaged = tmp_path / "data/train/a/7.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    result = run(
        torchrun(
            2,
            tmp_path,
            "data=folder",
            f"data.root={tmp_path}/data",
            "data.limit=null",
            "data.holdout=0",
            "data.image_size=32",
            "loader=torchvision",
            "batch=10",
        )
    )
    assert result.returncode != 0
    assert "7.png: cannot be decoded" in result.stderr
    assert re.search(
        r"^error: process [01] failed, and with it the run: .*7.png: cannot be decoded",
        result.stderr,
        re.MULTILINE,
    )
    assert "Connection closed" not in result.stderr


NOT_A_NUMBER = """
import runpy, sys
from proxynorm.train.loop import Trainer

original = Trainer.inputs

def inputs(self, batch, index):
    images, targets = original(self, batch, index)
    broken = self.state.step == 5 and self.process.rank == 0
    return (images * float("nan") if broken else images), targets

Trainer.inputs = inputs
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_process_that_is_not_finite_is_reported_once_with_its_layers(tmp_path):
    """The other process has non-finite gradients, but finite activations: it is not named."""
    script = tmp_path / "not_a_number.py"
    script.write_text(NOT_A_NUMBER)
    command = torchrun(2, tmp_path, "name=a")
    command[command.index("train.py")] = str(script)
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    told = re.findall(r"^error: (.*)$", result.stderr, re.MULTILINE)
    assert result.returncode == 1 and len(told) == 1, result.stderr
    assert re.match(
        r"step 6: loss nan, .*: not finite, first in the input images, .* of process 0; ", told[0]
    )


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(run_small, tmp_path):
    assert run(torchrun(2, tmp_path, "name=a", "max_steps=7")).returncode == 0
    again = run_small("name=a")
    assert again.status == 0 and again.rows[-1]["step"] == 20


@pytest.mark.slow
def test_kill_minus_nine_at_random_moments(tmp_path):
    """Killed again and again, the run ends with the bits of an uninterrupted one."""
    options = ["regularization.ema_decay=0.9", "checkpoint.every_steps=1", "epochs=12"]
    command = [sys.executable, "train.py", *SMALL, *options, f"runs_dir={tmp_path}"]
    metrics, generator = tmp_path / "killed" / "metrics.jsonl", random.Random(0)

    def last_step() -> int:
        rows = read_metrics(metrics)
        return rows[-1]["step"] if rows else 0

    for _ in range(3):
        goal = last_step() + generator.randint(1, 4)
        with subprocess.Popen(
            [*command, "name=killed"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and last_step() < goal:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.1))
            assert process.poll() is None, "the run ended before it could be killed"
            process.kill()
    for name in ("killed", "whole"):
        result = run([*command, f"name={name}"])
        assert result.returncode == 0, result.stderr
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


@pytest.mark.slow
def test_global_batch_norm_over_processes(run_small, tmp_path):
    """norm_batch=global: two processes of 10 images train as one of 20."""
    options = ("norm=bn", "regularization=none", "data.holdout=20")
    one = run_small(*options, "name=one")
    result = run(torchrun(2, tmp_path, *options, "norm_batch=global", "name=two"))
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
    for first, second in zip(one.rows[:10], read(tmp_path / "two").rows[:10], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)


def compare_compiled(rank: int, store: str) -> None:
    """Raise unless a compiled network on two processes computes what an eager one does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [NormAct2d(8, "ln_pn"), NormAct2d(8, "bn_pn", norm_batch="global")]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layers[0], nn.Conv2d(8, 8, 1), layers[1])
    compiled = copy.deepcopy(net)
    compiled.compile(options=inductor_options())
    images = torch.randn(2, 4, 3, 8, 8)[rank]
    for model in (net, compiled):
        DistributedDataParallel(model)(images).square().mean().backward()
    for ours, theirs in zip(compiled.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_compiled_processes_equal_eager_ones(tmp_path):
    torch.multiprocessing.spawn(compare_compiled, (str(tmp_path / "store"),), nprocs=2)
