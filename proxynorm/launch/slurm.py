"""SLURM's commands: submit a sweep's runs as an array, ask what is queued and how jobs ended. SLURM does the rest."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from proxynorm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT, REPORT_SCRIPT = ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "report.sbatch"
WARNING_SECONDS = 120  # slurm/train.sbatch asks to be warned so long before the time limit
NO_LIMIT = ("unlimited", "infinite", "-1")
FOR_REPORT = (
    "account",
    "partition",
    "qos",
    "reservation",
)  # what the report's job asks for as the runs do
Task = tuple[str, str]  # an array's job id and the task's index in it


class Queued(NamedTuple):
    """A task in SLURM's queue: its state, and why it waits, in SLURM's words."""

    state: str
    reason: str = ""


@dataclass(frozen=True)
class SlurmOptions:
    """What a run asks for, in sbatch's words, None leaving it to the cluster's defaults.

    gpus: of a run, over all its nodes, one process each; limit: array tasks at a time; stage: folder of each node into
    which the .beton files are copied first; requeues: how often a run may be queued again to end; sbatch: further
    arguments of sbatch; dry_run: submit nothing, tell all; retry_failed: submit the runs that failed, too; wait: until
    the array has ended; report: arguments of scripts/reproduce.py for a job after the array.
    """

    time: str | None = None
    partition: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    cpus_per_task: int | None = None
    limit: int | None = None
    stage: str | None = None
    requeues: int = 0
    sbatch: tuple[str, ...] = ()
    dry_run: bool = False
    retry_failed: bool = False
    wait: bool = False
    report: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command with the variables that are added to its environment."""

    words: tuple[str, ...]
    variables: dict[str, str]

    def __str__(self) -> str:
        return shlex.join(
            ["env", *(f"{name}={value}" for name, value in self.variables.items()), *self.words]
        )

    def submit(self) -> str:
        """Run it; the id of the submitted job. Raises ConfigError with SLURM's reason."""
        return ask(self.words, self.variables).strip().split(";")[0]


def ask(words: Sequence[str], variables: dict[str, str] | None = None) -> str:
    """What one of SLURM's commands prints. Raises ConfigError if it is missing or refuses; sbatch --wait, which prints the
    job's id and fails as the job does, has not refused."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(variables or {})},
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{words[0]} not found: launcher=slurm needs SLURM; launcher=local runs without"
        ) from None
    if done.returncode and not done.stdout.strip():
        raise ConfigError(f"{words[0]} refused: {' '.join(done.stderr.split())}")
    return done.stdout


def array_command(plan: Path, count: int, name: str, logs: Path, options: SlurmOptions) -> Command:
    """sbatch for the `count` runs of a plan file."""
    limit = f"%{options.limit}" if options.limit else ""
    variables = {"PROXYNORM_ROOT": str(ROOT)} | ({"STAGE": options.stage} if options.stage else {})
    words = ["sbatch", "--parsable", f"--array=0-{count - 1}{limit}", f"--job-name={name}"]
    words += [f"--output={pattern(logs)}/slurm-%A_%a.log", *requests(options), *options.sbatch]
    words += ["--wait"] if options.wait else []
    return Command((*words, str(TRAIN_SCRIPT), "--sweep", str(plan)), variables)


def report_command(jobs: Iterable[str], name: str, logs: Path, options: SlurmOptions) -> Command:
    """sbatch for the report after the arrays `jobs` have ended, well or not."""
    words = [
        "sbatch",
        "--parsable",
        f"--job-name={name}-report",
        f"--output={pattern(logs)}/slurm-report-%j.log",
    ]
    words += [f"--partition={options.partition}"] if options.partition else []
    asked = vars(further(options))
    words += [
        f"--{word}={asked[word]}" for word in FOR_REPORT if asked[word]
    ]  # it needs neither GPUs nor the runs' time
    words += [f"--dependency=afterany:{':'.join(jobs)}", str(REPORT_SCRIPT)]
    return Command((*words, *options.report), {"PROXYNORM_ROOT": str(ROOT)})


def pattern(path: Path) -> str:
    """The path in a file name for sbatch, where % begins a substitution."""
    return str(path).replace("%", "%%")


def requests(options: SlurmOptions) -> list[str]:
    """sbatch's arguments for what a run needs. Raises ConfigError for what cannot be."""
    nodes = options.nodes or 1
    for key in ("nodes", "cpus_per_task", "limit"):
        if getattr(options, key) is not None and getattr(options, key) < 1:
            raise ConfigError(f"{key}={getattr(options, key)}: must be at least 1")
    if (options.gpus or 0) < 0 or (options.gpus or 0) % nodes:
        raise ConfigError(f"gpus={options.gpus}: must be a multiple of nodes={nodes}")
    limit, warning = time_limit(options), warning_seconds(options)
    if limit <= warning:
        raise ConfigError(
            f"a time limit of {limit:.0f} s: runs are warned {warning} s before it, and would be stopped as soon as they start; "
            "give a longer time=, or a shorter warning as sbatch=[--signal=USR2@SECONDS]"
        )
    words = [f"--time={options.time}"] if options.time else []
    words += [f"--partition={options.partition}"] if options.partition else []
    words += [f"--nodes={options.nodes}"] if options.nodes else []
    words += (
        [f"--gpus-per-node={options.gpus // nodes}", f"--ntasks-per-node={options.gpus // nodes}"]
        if options.gpus
        else []
    )
    words += [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []
    return words


def queue() -> dict[Task, Queued]:
    """The user's array tasks that wait or run; empty where SLURM is not installed."""
    if shutil.which("squeue") is None:
        return {}
    lines = ask(["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T|%r"]).splitlines()
    rows = [line.strip().split("|", 3) for line in lines]
    return {(job, index): Queued(state, reason) for job, index, state, reason in rows}


def endings(jobs: Sequence[str]) -> dict[Task, str]:
    """How the tasks of the arrays `jobs` ended, in SLURM's words; empty where SLURM keeps no accounts."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    words = [
        "sacct",
        "--noheader",
        "--allocations",
        "--parsable2",
        f"--jobs={','.join(jobs)}",
        "--format=JobID,State",
    ]
    try:
        lines = ask(words).splitlines()
    except ConfigError:
        return {}
    rows = [line.split("|") for line in lines if "_" in line]
    return {tuple(name.split("_")): state.split()[0] for name, state in rows}


def further(options: SlurmOptions) -> argparse.Namespace:
    """What the further arguments of sbatch say of time, signal and FOR_REPORT's words, however they are written."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for short, word in (("-t", "time"), ("-A", "account"), ("-p", "partition"), ("-q", "qos")):
        parser.add_argument(short, f"--{word}")
    for word in ("signal", "reservation"):
        parser.add_argument(f"--{word}")
    try:
        return parser.parse_known_args(options.sbatch)[0]
    except argparse.ArgumentError as error:
        raise ConfigError(f"sbatch=[{','.join(options.sbatch)}]: {error}") from None


def time_limit(options: SlurmOptions) -> float:
    """The time limit of a run in seconds: what is asked for, else the partition's; infinite where there is none.

    Raises ConfigError for what is no time, or longer than the partition allows.
    """
    asked = further(options)
    time = asked.time or options.time or os.environ.get("SBATCH_TIMELIMIT")
    usual, most = partition_limits(
        asked.partition or options.partition or os.environ.get("SBATCH_PARTITION")
    )
    limit = seconds(time) if time else usual
    if limit > most:
        raise ConfigError(
            f"time={time}: the partition ends jobs after {most / 60:.0f} min; give a shorter time=, or partition="
        )
    return limit


def partition_limits(name: str | None) -> tuple[float, float]:
    """A partition's usual and longest time limit in seconds, the default partition's for None; infinite where SLURM tells
    none, or is not at hand."""
    if shutil.which("sinfo") is None:
        return math.inf, math.inf
    try:
        lines = ask(["sinfo", "--noheader", "--format=%P|%L|%l"]).splitlines()
    except ConfigError:
        return math.inf, math.inf
    for partition, usual, most in (line.strip().split("|") for line in lines):
        if partition.rstrip("*") == name or (name is None and partition.endswith("*")):
            longest = seconds(most)
            return longest if usual.lower() == "n/a" else seconds(usual), longest
    return math.inf, math.inf


def warning_seconds(options: SlurmOptions) -> int:
    """How long before its time limit a run is warned: sbatch's --signal=NAME@SECONDS, else slurm/train.sbatch's."""
    signal = further(options).signal
    if signal is None:
        return WARNING_SECONDS
    asked = signal.partition("@")[2]
    return int(asked) if asked.isdecimal() else 60  # sbatch's own default


def seconds(time: str) -> float:
    """A time limit in SLURM's notation (minutes, minutes:seconds, hours:minutes:seconds, days-hours:…) in seconds;
    infinite for UNLIMITED, INFINITE, -1 and zero, which sbatch takes for no limit.

    Raises ConfigError if it is none.
    """
    if time.lower() in NO_LIMIT:
        return math.inf
    days, separator, rest = time.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if separator:
            hours, minutes, seconds_ = [*parts, 0, 0][:3]
        elif len(parts) < 3:
            hours, minutes, seconds_ = 0, *[*parts, 0][:2]
        else:
            hours, minutes, seconds_ = parts
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds_ or math.inf
    except ValueError:
        raise ConfigError(
            f"time={time}: valid: minutes, hours:minutes:seconds, days-hours:minutes:seconds, UNLIMITED"
        ) from None
