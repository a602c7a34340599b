"""SLURM's commands without SLURM: requests, and the status of runs by squeue."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from proxynorm.errors import ConfigError
from proxynorm.launch import slurm
from proxynorm.launch.slurm import Jobs, SlurmOptions, launch_array
from proxynorm.launch.status import run_status
from proxynorm.paper.plan import status_text
from proxynorm.paper.table import table_runs
from tests.tiny_table import write_run

NO_RESULTS = Path("no results")


def test_requests_have_sbatch_s_names_and_a_process_for_each_gpu():
    words = slurm.requests(
        SlurmOptions(time="1:00:00", partition="gpu", nodes=2, gpus=16, cpus_per_task=8)
    )
    assert words == [
        "--time=1:00:00",
        "--partition=gpu",
        "--nodes=2",
        "--gpus-per-node=8",
        "--ntasks-per-node=8",
        "--cpus-per-task=8",
    ]
    assert slurm.requests(SlurmOptions()) == []
    for wrong in (SlurmOptions(nodes=2, gpus=3), SlurmOptions(nodes=0), SlurmOptions(limit=0)):
        with pytest.raises(ConfigError):
            slurm.requests(wrong)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands in the path; the returned function sets what they print."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def says(**outputs: str) -> None:
        for name, output in outputs.items():
            (folder / f"{name}.txt").write_text(output)
            (folder / name).write_text(f'#!/bin/sh\ncat "{folder}/{name}.txt"\n')
            (folder / name).chmod(0o755)

    says(sbatch="7\n", squeue="", scontrol="", sinfo="")
    return says


@pytest.fixture
def launch(capsys):
    """Submit runs and return the exit status and the output lines."""

    def go(runs, report=(), **options):
        code = launch_array(runs, "tiny", SlurmOptions(**options), report)
        return code, capsys.readouterr().out.splitlines()

    return go


def test_runs_of_two_folders_are_no_array(tiny, tmp_path, launch):
    runs = [run for folder in "ab" for run in table_runs(tiny, tmp_path / folder)]
    with pytest.raises(ConfigError, match="share one runs_dir"):
        launch(runs, dry_run=True)


def test_the_job_of_the_report_waits_for_the_array_and_requests_little(tiny, tmp_path, launch):
    further = ["--gres=gpu:8", "--time=1", "--account=lab", "--qos=high", "--nice=5"]
    further.append("--dependency=afterany:1")
    runs = table_runs(tiny, tmp_path / "runs")
    words = shlex.split(launch(runs, ["report"], sbatch=further, dry_run=True)[1][-1])
    assert {"--account=lab", "--qos=high", "--dependency=afterany:ARRAY"} <= set(words)
    assert not [
        word
        for word in words
        if word.startswith(("--gres", "--time", "--nice", "--dependency=afterany:1"))
    ]


def test_paths_are_literal_in_sbatch_s_file_names(tiny, tmp_path, launch):
    runs = table_runs(tiny, tmp_path / "100% %j")
    options = {"limit": 2, "stage": "/dev/shm", "dry_run": True}
    command = shlex.split(launch(runs, **options)[1][1])
    logs = f"{tmp_path}/100%% %%j/tiny/logs"
    assert f"--output={logs}/slurm-%A_%a.log" in command and "--array=0-3%2" in command
    assert command[:4] == ["env", f"PROXYNORM_ROOT={slurm.ROOT}", "STAGE=/dev/shm", "sbatch"]


@pytest.fixture
def launched(tiny, tmp_path, commands, launch):
    """The tiny table's four runs, submitted as array 7."""
    runs = table_runs(tiny, tmp_path / "runs")
    assert launch(runs) == (
        0,
        [
            "4 runs to do, 24 s (estimate for one CPU core)",
            f"submitted array 7 of 4 runs: {tmp_path}/runs/tiny/slurm/plan-1.json",
        ],
    )
    return runs


def test_a_plan_holds_the_arguments_of_each_run(launched):
    content = json.loads((launched[0].folder.parent / "slurm/plan-1.json").read_text())
    assert content["job"] == "7" and [run["arguments"] for run in content["runs"]] == [
        list(run.arguments) for run in launched
    ]


def test_states_come_from_the_queue_and_the_folders(launched, commands):
    write_run(launched[0], 50.0, epochs=3)
    write_run(launched[1], 50.0)
    (launched[0].folder / "summary.json").unlink()
    commands(squeue="7|0|PENDING|PartitionTimeLimit\n7|2|RUNNING|None\n")
    text = status_text(launched, NO_RESULTS)
    assert [Jobs(launched[0].folder.parent).status(run).state for run in launched] == [
        "preempted",
        "done",
        "running",
        "missing",
    ]
    assert (
        "job 7_0  step 4/12  loss 1.9000  PartitionTimeLimit" in text
        and "1 done, 1 running, 1 preempted, 1 missing" in text
    )
    commands(squeue="")
    jobs = Jobs(launched[0].folder.parent)
    assert [jobs.status(run).state for run in launched] == ["stopped", "done", "missing", "missing"]


def test_a_lock_left_on_another_node_does_not_count_once_the_task_is_gone(launched, commands):
    write_run(launched[0], 50.0, epochs=3)
    (launched[0].folder / "summary.json").unlink()
    (launched[0].folder / ".lock").write_text("node17 pid 4711")
    jobs = Jobs(launched[0].folder.parent)
    assert (
        run_status(launched[0]).state == "running" and jobs.status(launched[0]).state == "stopped"
    )


def test_a_failure_before_the_log_was_opened_is_reported(launched):
    (launched[0].folder.parent / "logs/slurm-7_0.log").write_text(
        "env.sh: line 3: module: command not found\n"
    )
    (launched[0].folder.parent / "logs/slurm-7_1.log").write_text(
        "slurmstepd: error: *** JOB 9 ON n CANCELLED AT 2026 ***\n"
    )
    (launched[0].folder.parent / "logs/slurm-7_2.log").write_text(
        "loading cuda/12.4\n# goes on in logs/bn-s1.log\n"
    )
    (launched[0].folder.parent / "logs/slurm-7_3.log").write_text(
        "# goes on in logs/bn-s1.log\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.0\n"
    )
    assert [Jobs(launched[0].folder.parent).status(run).state for run in launched] == [
        "failed",
        "missing",
        "missing",
        "failed",
    ]
    assert "module: command not found" in status_text(launched, NO_RESULTS)


def test_queued_and_failed_runs_are_not_submitted_again(launched, commands, launch):
    launched[0].log.write_text("ValueError: no\n# exit status 1\n")
    commands(squeue="7|1|PENDING|Priority\n7|2|RUNNING|None\n", sbatch="8\n")
    code, lines = launch(launched)
    assert code == 1 and lines[:3] == [
        "bn-s0: failed: ValueError: no",
        "ln_pn-s0: queued as job 7_1",
        "bn-s1: running as job 7_2",
    ]
    assert lines[4].startswith("submitted array 8 of 1 runs") and "retry_failed=true" in lines[-1]
    commands(squeue="7|1|PENDING|Priority\n7|2|RUNNING|None\n8|0|PENDING|Resources\n")
    assert launch(launched, retry_failed=True)[0] == 0


def test_a_dry_run_leaves_nothing_behind(tiny, tmp_path, commands, launch):
    before = sorted(tmp_path.rglob("*"))
    code, lines = launch(table_runs(tiny, tmp_path / "runs"), ["report"], dry_run=True)
    assert code == 0 and sorted(tmp_path.rglob("*")) == before
    assert " sbatch " in lines[1] and len(lines) == 7 and lines[6].endswith("report.sbatch report")


def test_slurm_s_refusal_is_one_line_and_leaves_no_plan(tiny, tmp_path, commands, launch):
    (tmp_path / "bin/sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n"
    )
    runs = table_runs(tiny, tmp_path / "runs")
    with pytest.raises(ConfigError, match="SLURM refused: sbatch: error: invalid partition"):
        launch(runs)
    assert not list((tmp_path / "runs/tiny/slurm").glob("plan-*"))


def test_the_status_works_without_an_answer_from_slurm(launched, tmp_path, capsys):
    (tmp_path / "bin/squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    assert (
        status_text(launched, NO_RESULTS) == "4 missing"
        and "Unable to contact" in capsys.readouterr().err
    )


def test_launching_without_slurm_is_an_error(tiny, tmp_path, monkeypatch, launch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="launcher=slurm needs SLURM"):
        launch(table_runs(tiny, tmp_path / "runs"))
    assert status_text(table_runs(tiny, tmp_path / "runs"), NO_RESULTS) == "4 missing"


@pytest.mark.parametrize(
    ("log", "state"),
    [
        (
            "ValueError: no\nsrun: error: n1: task 0: Exited with exit code 1\n# exit status 1\n",
            "failed",
        ),
        ("  step 3/9\nsrun: error: n1: task 0: Killed\n# exit status 137\n", "missing"),
        (
            "slurmstepd-n1: error: Detected 1 oom_kill event in StepId=1.0.\n# exit status 137\n",
            "failed",
        ),
        ("error: runs/x is in use by host pid 1; wait for it\n# exit status 2\n", "missing"),
        ("# exit status 140\n", "missing"),
        ("# job 7_0 on n1\nslurmstepd: error: execve(): No such file\n# exit status 2\n", "failed"),
    ],
)
def test_exits_under_srun(tiny, tmp_path, log, state):
    run = table_runs(tiny, tmp_path / "runs")[0]
    run.log.parent.mkdir(parents=True)
    run.log.write_text(log)
    assert run_status(run).state == state
    assert state != "failed" or run_status(run).error in ("ValueError: no", *log.splitlines()[:2])
