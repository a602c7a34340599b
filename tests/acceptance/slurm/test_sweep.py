"""A table as an array under a real SLURM: launched twice at once, killed, launched again."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from proxynorm.cli import parse_options
from proxynorm.commands.reproduce import Options, main
from proxynorm.launch.runs import Run
from proxynorm.launch.slurm import plan_paths
from proxynorm.launch.status import finished_files
from proxynorm.paper.findings import gather
from proxynorm.paper.report import write_report
from proxynorm.paper.table import load_table, table_runs
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.run import train
from proxynorm.train.run_folder import read_metrics
from tests.acceptance.slurm.conftest import ROOT, needs_slurm
from tests.helpers import SMALL
from tests.same_run import differences
from tests.tiny_table import reproduce

pytestmark = [pytest.mark.slow, needs_slurm]

STEPS = 200
TABLE = """
title: Eight small cells
about: A table for tests.
train: [data=fashion_mnist, model=resnet20v2, model.depth=8, model.width=8, batch=20, epochs=4,
        data.limit=1000, norm.groups=2, data.holdout=200, log_every=1, eval_every=4,
        loader=torchvision, loader.workers=0, logger=none]
cells:
  - norm: [bn, ln, gn, in, bn_pn, ln_pn, gn_pn, in_pn]
rows: [norm]
seeds: 2
minutes: 0.1
hardware: one CPU core
"""


@pytest.fixture
def script(slurm, monkeypatch, capsys):
    """scripts/reproduce.py in this process, which spares its start; returns what it prints."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)

    def go(command: str, *words: str) -> str:
        capsys.readouterr()
        assert main(parse_options(Options, [f"command={command}", *words])) == 0
        return capsys.readouterr().out

    return go


def submitted(said: str) -> int:
    return sum(int(count) for count in re.findall(r"submitted array \d+ of (\d+) runs", said))


def running(slurm, job: str) -> list[str]:
    """The indices of the array's tasks that run."""
    return slurm.run("squeue", "-h", "-r", "-j", job, "-t", "RUNNING", "-o", "%K").split()


def in_the_middle(run: Run) -> bool:
    """Whether it has more rows than the first step's, which has no times."""
    return 1 < len(read_metrics(run.folder / "metrics.jsonl")) < STEPS // 2


def check_status_of_a_running_task(slurm, job: str, runs: list[Run], status) -> None:
    """Step, loss and ETA of a task, halted meanwhile, are those of its last row."""
    run = None
    while run is None:
        slurm.wait_for(lambda: any(map(in_the_middle, runs)), "no run trains", 120, every=0.02)
        run = next(filter(in_the_middle, runs), None)
    pid = int((run.folder / ".lock").read_text().split()[-1])
    os.kill(pid, signal.SIGSTOP)
    try:
        row, said = read_metrics(run.folder / "metrics.jsonl")[-1], status()
    finally:
        os.kill(pid, signal.SIGCONT)
    words = rf"step {row['step']}/{STEPS}  loss {row['loss']:.4f}  ETA 0:\d\d:\d\d"
    assert re.search(
        rf"^{run.name} +running +job {job}_{runs.index(run)}  {words}$", said, re.MULTILINE
    ), said


def trouble(slurm, job: str, runs: list[Run]) -> list[Run]:
    """Cancel one task in training, kill another's process, signal a third, which requeues itself.

    Returns the three runs. Checks the limit of two at a time.
    """
    troubled: list[Run] = []

    def due(run: Run) -> bool:
        return run not in troubled and in_the_middle(run)

    while len(troubled) < 3:
        slurm.wait_for(lambda: any(map(due, runs)), "no run trains", 120, every=0.02)
        run = next(filter(due, runs), None)
        if run is None:
            continue
        task = f"{job}_{runs.index(run)}"
        if len(troubled) == 1:
            os.kill(int((run.folder / ".lock").read_text().split()[-1]), signal.SIGKILL)
        else:
            slurm.run("scancel", *(["--signal=USR2"] if troubled else []), task)
        troubled.append(run)
        assert len(running(slurm, job)) <= 2
    return troubled


def train_unbroken(runs: list[Run]) -> None:
    """The same runs, one after another in this process."""
    for run in runs:
        config = compose_config(run.arguments)
        assert train(settings_from(config), OmegaConf.to_container(config, resolve=True)) == 0


def report_of(table, runs: list[Run], folder: Path) -> str:
    """The report's text without the folder and what was measured in seconds."""
    write_report(gather(table, runs, folder / "no kept runs"), folder)
    lines = (folder / "report.md").read_text().splitlines()
    return "\n".join(
        line for line in lines if not re.search(r"\bh\b|hours|seconds|images/s|minutes", line)
    )


def test_a_table_killed_in_the_middle_and_launched_again_is_that_of_an_unbroken_sweep(
    slurm, script, tmp_path
):
    path, root = tmp_path / "it's $(eight).yaml", tmp_path / "the runs"
    path.write_text(TABLE)
    table = load_table(str(path))
    runs = table_runs(table, root)
    words = [
        f"table={json.dumps(str(path))}",
        f"root={root}",
        f"results={tmp_path / 'results'}",
        "wandb=disabled",
        "limit=2",
    ]
    shown = script("launch", "launcher=slurm", *words, "dry_run=true")
    assert (
        "--array=0-15%2" in shown
        and shown.count("] python train.py") == 16
        and not plan_paths(runs[0].folder.parent)
    )

    with ThreadPoolExecutor() as pool:
        both = list(
            pool.map(
                lambda _: slurm.check(*reproduce("launch", "launcher=slurm", *words), cwd=ROOT),
                range(2),
            )
        )
    assert submitted("".join(both)) == 16, both
    job = re.search(r"submitted array (\d+)", "".join(both))[1]
    assert re.search(r"\d queued", script("status", *words[:2]))
    check_status_of_a_running_task(slurm, job, runs, lambda: script("status", *words[:2]))
    *killed, signalled = trouble(slurm, job, runs)
    unbroken = table_runs(table, tmp_path / "unbroken")
    train_unbroken(unbroken)
    slurm.wait_for(
        lambda: not slurm.run("squeue", "-h", "-r", "-j", job).strip(),
        "the array has not ended",
        400,
        every=0.5,
    )
    assert {run.name for run in runs if finished_files(run.folder) is None} == {
        run.name for run in killed
    }

    again = script("launch", "launcher=slurm", *words)
    assert submitted(again) == 2 and again.count(": finished") == 14
    report = re.search(r"submitted job (\d+), the report", again)[1]
    assert slurm.wait_until_settled(report, 200) == "COMPLETED"
    assert (tmp_path / "results" / table.name / "report.md").is_file()
    assert "nothing to submit" in script("launch", "launcher=slurm", *words)
    for run, whole in zip(runs, unbroken, strict=True):
        assert differences(run.folder, whole.folder) == []
        starts = run.log.read_text().count("$ python train.py")
        assert starts == (2 if run in killed else 1) or (
            run is signalled and starts > 1
        )  # SLURM may repeat a signal
    assert report_of(table, runs, tmp_path / "a") == report_of(table, unbroken, tmp_path / "b")


def test_a_hydra_multirun_becomes_an_array(slurm, tmp_path):
    """Finished runs are not submitted again; failed ones only when asked for."""
    sweep = [
        sys.executable,
        "train.py",
        "optim.lr=0.01,1e30",
        "-m",
        "hydra/launcher=slurm",
        "hydra.launcher.limit=2",
        *SMALL,
        "model.width=8",
        "data.limit=100",
        "epochs=1",
        "loader=torchvision",
        "loader.workers=0",
        f"runs_dir={tmp_path}",
    ]
    said = slurm.check(*sweep, cwd=ROOT)
    assert "2 runs to do" in said and submitted(said) == 2, said
    job = re.search(r"submitted array (\d+)", said)[1]
    slurm.wait_for(
        lambda: not slurm.run("squeue", "-h", "-r", "-j", job).strip(),
        "the array has not ended",
        120,
        every=0.5,
    )
    said = slurm.check(*sweep, cwd=ROOT, status=1)
    assert re.search(
        r": finished\n.*: failed: step \d+: loss nan.*\nnothing to submit\n1 failed runs are", said
    )
    said = slurm.check(*sweep, "hydra.launcher.retry_failed=true", cwd=ROOT)
    assert "1 runs to do, 60 s (measured)" in said and submitted(said) == 1
