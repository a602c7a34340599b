"""slurm/train.sbatch under a real SLURM: it trains, stops and resumes to the same bits."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.sources import list_source
from proxynorm.train.arguments import quoted
from proxynorm.train.run_folder import read_metrics
from tests.acceptance.slurm.cluster import SETTLED
from tests.acceptance.slurm.conftest import needs_slurm
from tests.data.conftest import needs_ffcv, write_folder
from tests.helpers import ROOT, SMALL
from tests.same_run import differences

INTERRUPTIONS, JOBS = int(os.environ.get("SLURM_INTERRUPTIONS", "10")), 5
MIDDLE = ("data.limit=2000", "epochs=3", "eval_every=3")  # 300 updates
# width 8: without AVX-512, oneDNN's backward 1×1 convolution of stride 2 over 4 channels
# writes past its memory
TINY = (*SMALL, "model.width=8", "loader=torchvision", "loader.workers=0")
pytestmark = [pytest.mark.slow, needs_slurm]


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    return [*TINY, f"runs_dir={quoted(str(folder))}", f"name={quoted(name)}", *more]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def stops(log: Path) -> tuple[list[str], list[str]]:
    """The steps at which the job's run stopped, and at which it went on."""
    text = log.read_text()
    return re.findall(r"stopped at step (\d+)", text), re.findall(r"resumed at step (\d+)", text)


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_tasks_train_together(slurm, submit, tmp_path, nodes):
    """On nodes with two GPUs each, as SLURM believes: one process a node is warned of.

    The ranks get the job's environment whatever of the submitter's the job got."""
    shape = (
        f"--nodes={nodes}",
        f"--ntasks-per-node={2 // nodes}",
        "--gpus-per-node=2",
        f"--export={'ALL' if nodes == 1 else 'NONE'}",
    )
    job = submit(*shape, overrides=arguments(tmp_path, "pair", "device=cpu"))
    assert slurm.wait_until_settled(job, 120) == "COMPLETED", (
        tmp_path / f"job-{job}.log"
    ).read_text()
    log = (tmp_path / f"job-{job}.log").read_text()
    assert "batch 20 = 2 × 1 × 10" in log and log.endswith("# exit status 0\n")
    assert ("warning: 1 process(es) a node, but 2 GPU(s)" in log) == (nodes == 2)
    assert (
        summary(tmp_path / "pair")["completed"]
        and (tmp_path / "pair/checkpoints/last.pt").is_file()
    )


def has_pending(pid: int, number: int) -> bool:
    """Whether the signal waits for the stopped process; True as well when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def hold_until_warned(slurm, job: str, folder: Path) -> None:
    """Halt the run until SLURM has warned it of its time limit, rather than train for a minute.

    The limit is raised before the run goes on, so that its next start has the new one. On a slow
    machine the run may have been warned, and have ended, before it is halted.
    """
    slurm.wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) > 3, "no rows", 120)
    pid = int((folder / ".lock").read_text().split()[-1])
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        slurm.wait_for(lambda: has_pending(pid, signal.SIGUSR2), "no warning", 60)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_a_run_longer_than_its_time_limit_is_that_of_an_unbroken_one(
    slurm, submit, run_small, tmp_path
):
    """SLURM checks time limits every 30 s and warns up to 30 s early: here after 5 to 35 s."""
    job = submit("--time=1", "--signal=USR2@25", overrides=arguments(tmp_path, "limited", *MIDDLE))
    log = tmp_path / f"job-{job}.log"
    hold_until_warned(slurm, job, tmp_path / "limited")
    slurm.wait_for(lambda: stops(log)[0], "not stopped", 30)
    whole = run_small(*arguments(tmp_path, "whole", *MIDDLE))
    assert slurm.wait_until_settled(job, 200) == "COMPLETED", log.read_text()
    stopped, resumed = stops(log)
    assert len(stopped) == 1 and stopped == resumed and "by SIGUSR2; saved" in log.read_text()
    # warned while the limit was a minute, not when it was ten
    assert log.read_text().count("warning: the time limit is no longer than the 120 s") == 1
    assert differences(tmp_path / "limited", whole.folder) == []


def interrupt(slurm, job: str, metrics: Path, chance: random.Random) -> bool:
    """Requeue or signal the job after its next row or while it starts; False if it had ended."""
    slurm.wait_for(
        lambda: slurm.state(job) in ("RUNNING", "COMPLETED"), f"job {job} does not run", 120
    )
    before, rows_first = length(metrics), chance.random() < 0.7
    until = time.monotonic() + (60 if rows_first else chance.uniform(0, 8))
    while time.monotonic() < until and length(metrics) <= before:
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.5))
    how = chance.choice(
        [("scontrol", "requeue"), ("scancel", "--signal=USR2"), ("scancel", "--signal=TERM")]
    )
    restarts = slurm.field(job, "Restarts")
    slurm.run(*how, job)
    slurm.wait_for(
        lambda: slurm.field(job, "Restarts") != restarts or slurm.state(job) in SETTLED,
        f"job {job} was not queued again after {how}",
        120,
    )
    return slurm.field(job, "Restarts") != restarts


def length(metrics: Path) -> int:
    return metrics.stat().st_size if metrics.exists() else 0


def test_requeues_and_signals_at_random_moments_lose_nothing(slurm, submit, run_small, tmp_path):
    each = -(-INTERRUPTIONS // JOBS)
    jobs = {
        f"broken {number}": submit(overrides=arguments(tmp_path, f"broken {number}", *MIDDLE))
        for number in range(JOBS)
    }

    def trouble(item: tuple[str, str]) -> int:
        chance = random.Random(item[0])
        return sum(
            interrupt(slurm, item[1], tmp_path / item[0] / "metrics.jsonl", chance)
            for _ in range(each)
        )

    with ThreadPoolExecutor() as pool:
        interrupted = pool.map(trouble, jobs.items())
        whole = run_small(*arguments(tmp_path, "whole", *MIDDLE))
    assert sum(interrupted) >= INTERRUPTIONS
    for name, job in jobs.items():
        assert slurm.wait_until_settled(job, 200) == "COMPLETED", (
            tmp_path / f"job-{job}.log"
        ).read_text()
        stopped, resumed = stops(tmp_path / f"job-{job}.log")
        assert [step for step in stopped if step != "0"] == resumed
        assert differences(tmp_path / name, whole.folder) == []


def test_words_reach_the_job_literally(slurm, submit, tmp_path):
    """Characters that a shell interprets, in a name and in a path."""
    trap = tmp_path / "trap"
    name = f"""it's "a" $(touch {trap.name}) `touch {trap.name}`; touch {trap.name} * \\ %j é"""
    folder = tmp_path / "some $(touch trap) folder's"
    job = submit(
        overrides=[*TINY, f"runs_dir={quoted(str(folder))}", f"name={quoted(name)}", "epochs=1"]
    )
    assert slurm.wait_until_settled(job, 120) == "COMPLETED", (
        tmp_path / f"job-{job}.log"
    ).read_text()
    assert summary(folder / name)["name"] == name
    assert not trap.exists() and not (ROOT / trap.name).exists()


@needs_ffcv
def test_data_is_staged_to_the_node_once(slurm, submit, tmp_path):
    """Two jobs at once train on one copy, made on the node; the source is not read after that."""
    for part in ("train", "val"):
        photos = write_folder(tmp_path / "photos", 8, 4) if part == "train" else tmp_path / "photos"
        prepare(
            list_source(photos / part), tmp_path / "the data" / f"{part}.beton", StorageOptions()
        )
    (tmp_path / "node").mkdir()
    words = [
        "data=beton",
        f"data.root={quoted(str(tmp_path / 'the data'))}",
        "loader=ffcv",
        "loader.workers=1",
        "data.image_size=32",
        "data.limit=null",
        "data.holdout=0",
        "batch=8",
    ]
    jobs = [
        submit(
            overrides=arguments(tmp_path, f"staged {number}", *words),
            environment={"STAGE": str(tmp_path / "node")},
        )
        for number in range(2)
    ]
    for number, job in enumerate(jobs):
        assert slurm.wait_until_settled(job, 120) == "COMPLETED", (
            tmp_path / f"job-{job}.log"
        ).read_text()
        config = (tmp_path / f"staged {number}/config.yaml").read_text()
        assert f"root: {tmp_path}/node/proxynorm-{os.getuid()}/" in config
    assert len(list((tmp_path / "node").glob("proxynorm-*/*/train.beton"))) == 1


def test_a_failure_is_not_queued_again(slurm, submit, tmp_path):
    job = submit(overrides=arguments(tmp_path, "wrong", "norm=ln_pm"))
    assert slurm.wait_until_settled(job, 60) == "FAILED" and slurm.field(job, "ExitCode") == "2:0"
    log = (tmp_path / f"job-{job}.log").read_text()
    assert (
        "did you mean 'ln_pn'" in log
        and log.endswith("# exit status 2\n")
        and slurm.field(job, "Restarts") == "0"
    )


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, submit, tmp_path):
    job = submit(overrides=arguments(tmp_path, "cancelled", "epochs=500", "eval_every=500"))
    metrics = tmp_path / "cancelled/metrics.jsonl"
    slurm.wait_for(lambda: len(read_metrics(metrics)) > 3, "no rows", 120)
    slurm.run("scancel", job)
    assert slurm.wait_until_settled(job, 60) == "CANCELLED" and slurm.field(job, "Restarts") == "0"
    assert summary(tmp_path / "cancelled")["steps"] == read_metrics(metrics)[-1]["step"] > 3


KILLED_AT_START = """
import os, signal, sys

if any(word.endswith("train.py") for word in sys.orig_argv):
    os.kill(os.getpid(), signal.SIGUSR2)
"""


def test_a_job_that_never_gets_further_is_not_queued_for_ever(slurm, submit, tmp_path):
    """Stopped each time while Python starts: it ends as failed after one fruitless requeue.

    SLURM refuses the first request for a requeue.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(
        f"#!/bin/sh\n[ $1 != requeue ] || ! mkdir '{tmp_path}/refused' || exit 1\n"
        f'exec {shutil.which("scontrol")} "$@"\n'
    )
    (tmp_path / "bin/scontrol").chmod(0o755)
    (tmp_path / "sitecustomize.py").write_text(KILLED_AT_START)
    environment = {
        "FRUITLESS_REQUEUES": "1",
        "PATH": f"{tmp_path}/bin:{slurm.environment['PATH']}",
        "PYTHONPATH": str(tmp_path),
    }
    job = submit(overrides=arguments(tmp_path, "stuck"), environment=environment)
    slurm.wait_for(lambda: slurm.state(job) in SETTLED, "it runs on", 180, every=0.5)
    assert slurm.state(job) == "FAILED" and slurm.field(job, "Restarts") == "1"
    assert (tmp_path / "refused").is_dir() and "after 1 requeues" in (
        tmp_path / f"job-{job}.log"
    ).read_text()
