"""SLURM's commands: submit an array of runs and the report after it, ask for the queue."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxynorm.cli import option
from proxynorm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT, REPORT_SCRIPT = ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "report.sbatch"
# Arguments of sbatch that the report's job shares with the runs.
FOR_REPORT = ("--account=", "--partition=", "--qos=", "--reservation=")
Task = tuple[str, str]  # an array's job id and the task's index in it


@dataclass
class SlurmOptions:
    """The resources of a run, in sbatch's terms; None leaves them to the cluster's defaults.

    These are the options of `reproduce launch` and of hydra/launcher=slurm.
    """

    time: str | None = option(
        None, "slurm: time limit of a run, in sbatch's notation: 90 (minutes), 12:00:00"
    )
    partition: str | None = option(None, "slurm: partition")
    nodes: int | None = option(None, "slurm: nodes of a run")
    gpus: int | None = option(None, "slurm: GPUs of a run, over all its nodes, a process each")
    cpus_per_task: int | None = option(None, "slurm: CPUs of a process")
    limit: int | None = option(None, "slurm: array tasks at a time")
    stage: str | None = option(
        None, "slurm: folder on each node, as /dev/shm, into which .beton files are copied first"
    )
    sbatch: list[str] = option(
        [], "slurm: further arguments of sbatch, as sbatch=[--account=A,--mem=32G]"
    )
    retry_failed: bool = option(False, "slurm: submit failed runs again")
    dry_run: bool = option(False, "slurm: print the sbatch command and its runs, submit nothing")


def array_command(
    plan: Path, count: int, name: str, logs: Path, options: SlurmOptions
) -> list[str]:
    """The sbatch command for the `count` runs of a plan file. Raises ConfigError in a wheel."""
    if not TRAIN_SCRIPT.is_file():
        raise ConfigError("SLURM jobs start from slurm/train.sbatch: git clone, and launch there")
    limit = f"%{options.limit}" if options.limit else ""
    words = sbatch_command(name, f"{pattern(logs)}/slurm-%A_%a.log", options.stage)
    words += [f"--array=0-{count - 1}{limit}", *requests(options), *options.sbatch]
    return [*words, str(TRAIN_SCRIPT), "--sweep", str(plan)]


def report_command(
    jobs: Iterable[str], name: str, logs: Path, options: SlurmOptions, report: Sequence[str]
) -> list[str]:
    """The sbatch command for the report after the arrays `jobs` have ended, well or not.

    report: the arguments of scripts/reproduce.py.
    """
    words = sbatch_command(f"{name}-report", f"{pattern(logs)}/slurm-report-%j.log")
    words += [f"--partition={options.partition}"] if options.partition else []
    # The report needs neither the runs' GPUs nor their time.
    words += [word for word in options.sbatch if word.startswith(FOR_REPORT)]
    return [*words, f"--dependency=afterany:{':'.join(jobs)}", str(REPORT_SCRIPT), *report]


def sbatch_command(name: str, output: str, stage: str | None = None) -> list[str]:
    variables = [f"PROXYNORM_ROOT={ROOT}", *([f"STAGE={stage}"] if stage else [])]
    return ["env", *variables, "sbatch", "--parsable", f"--job-name={name}", f"--output={output}"]


def pattern(path: Path) -> str:
    """Escape a path for sbatch's file names, where % begins a substitution."""
    return str(path).replace("%", "%%")


def requests(options: SlurmOptions) -> list[str]:
    """The arguments of sbatch for a run's resources. Raises ConfigError for impossible ones."""
    nodes, gpus = options.nodes or 1, options.gpus or 0
    for key in ("nodes", "cpus_per_task", "limit"):
        if getattr(options, key) is not None and getattr(options, key) < 1:
            raise ConfigError(f"{key}={getattr(options, key)}: must be at least 1")
    if gpus < 0 or gpus % nodes:
        raise ConfigError(f"gpus={gpus}: must be a multiple of nodes={nodes}")
    values = {"time": options.time, "partition": options.partition, "nodes": options.nodes}
    values |= {"gpus-per-node": gpus // nodes, "ntasks-per-node": gpus // nodes}
    values |= {"cpus-per-task": options.cpus_per_task}
    return [f"--{name}={value}" for name, value in values.items() if value]


def submit(command: Sequence[str]) -> str:
    """Run an sbatch command; the job's id. Raises ConfigError if SLURM is missing or refuses."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch not found: launcher=slurm needs SLURM; use launcher=local")
    return ask(command).strip().split(";")[0]


def ask(command: Sequence[str]) -> str:
    """The output of one of SLURM's commands. Raises ConfigError if it refuses."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"SLURM refused: {' '.join(done.stderr.split())}")
    return done.stdout


def queue() -> dict[Task, tuple[str, str]]:
    """State and reason of the user's queued tasks; empty where SLURM is not installed."""
    if shutil.which("squeue") is None:
        return {}
    lines = ask(["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T|%r"]).splitlines()
    rows = [line.strip().split("|", 3) for line in lines]
    return {(job, index): (state, reason) for job, index, state, reason in rows}
