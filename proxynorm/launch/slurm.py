"""SLURM's commands: submit an array of runs, ask for the queue and for how jobs ended."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxynorm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT, REPORT_SCRIPT = ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "report.sbatch"
# Arguments of sbatch that the report's job shares with the runs.
FOR_REPORT = ("--account=", "--partition=", "--qos=", "--reservation=")
Task = tuple[str, str]  # an array's job id and the task's index in it


@dataclass(frozen=True)
class SlurmOptions:
    """The resources of a run, in sbatch's terms; None leaves them to the cluster's defaults.

    gpus: of a run, over all its nodes, one process each; limit: array tasks at a time; stage:
    folder on each node into which .beton files are copied first; sbatch: further arguments of
    sbatch; dry_run: print, submit nothing; retry_failed: submit failed runs too; report:
    arguments of scripts/reproduce.py for a job after the array.
    """

    time: str | None = None
    partition: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    cpus_per_task: int | None = None
    limit: int | None = None
    stage: str | None = None
    sbatch: tuple[str, ...] = ()
    dry_run: bool = False
    retry_failed: bool = False
    report: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command with variables added to its environment."""

    words: tuple[str, ...]
    variables: dict[str, str]

    def __str__(self) -> str:
        variables = (f"{name}={value}" for name, value in self.variables.items())
        return shlex.join(["env", *variables, *self.words])

    def submit(self) -> str:
        """Run it and return the id of the submitted job. Raises ConfigError if SLURM refuses."""
        return ask(self.words, self.variables).strip().split(";")[0]


def ask(words: Sequence[str], variables: dict[str, str] | None = None) -> str:
    """The output of one of SLURM's commands. Raises ConfigError if it is missing or refuses."""
    environment = {**os.environ, **(variables or {})}
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        raise ConfigError(
            f"{words[0]} not found: launcher=slurm needs SLURM; use launcher=local"
        ) from None
    if done.returncode:
        raise ConfigError(f"{words[0]} refused: {' '.join(done.stderr.split())}")
    return done.stdout


def array_command(plan: Path, count: int, name: str, logs: Path, options: SlurmOptions) -> Command:
    """The sbatch command for the `count` runs of a plan file. Raises ConfigError in a wheel."""
    if not TRAIN_SCRIPT.is_file():
        raise ConfigError("SLURM jobs start from slurm/train.sbatch: git clone, and launch there")
    limit = f"%{options.limit}" if options.limit else ""
    variables = {"PROXYNORM_ROOT": str(ROOT)} | ({"STAGE": options.stage} if options.stage else {})
    words = ["sbatch", "--parsable", f"--array=0-{count - 1}{limit}", f"--job-name={name}"]
    words += [f"--output={pattern(logs)}/slurm-%A_%a.log", *requests(options), *options.sbatch]
    return Command((*words, str(TRAIN_SCRIPT), "--sweep", str(plan)), variables)


def report_command(jobs: Iterable[str], name: str, logs: Path, options: SlurmOptions) -> Command:
    """The sbatch command for the report after the arrays `jobs` have ended, well or not."""
    words = ["sbatch", "--parsable", f"--job-name={name}-report"]
    words += [f"--output={pattern(logs)}/slurm-report-%j.log"]
    words += [f"--partition={options.partition}"] if options.partition else []
    # The report needs neither the runs' GPUs nor their time.
    words += [word for word in options.sbatch if word.startswith(FOR_REPORT)]
    words += [f"--dependency=afterany:{':'.join(jobs)}", str(REPORT_SCRIPT)]
    return Command((*words, *options.report), {"PROXYNORM_ROOT": str(ROOT)})


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


def queue() -> dict[Task, tuple[str, str]]:
    """State and reason of the user's queued tasks; empty where SLURM is not installed."""
    if shutil.which("squeue") is None:
        return {}
    lines = ask(["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T|%r"]).splitlines()
    rows = [line.strip().split("|", 3) for line in lines]
    return {(job, index): (state, reason) for job, index, state, reason in rows}


def endings(jobs: Sequence[str]) -> dict[Task, str]:
    """The final states of the tasks of the arrays `jobs`; empty where SLURM keeps no accounts."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    words = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State"]
    try:
        lines = ask([*words, f"--jobs={','.join(jobs)}"]).splitlines()
    except ConfigError:
        return {}
    rows = [line.split("|") for line in lines if "_" in line]
    return {tuple(name.split("_")): state.split()[0] for name, state in rows}
