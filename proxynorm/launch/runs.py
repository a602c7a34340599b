"""A cell's runs: their folders, commands, and where each stands, read from the files they leave."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import yaml

from proxynorm.cli import first_line
from proxynorm.errors import ConfigError, DataError
from proxynorm.launch.damage import Damaged, check_finished, folder_error, parse_summary
from proxynorm.paper.table import Cell, Table
from proxynorm.train.preemption import REQUEUE
from proxynorm.train.run_folder import read_metrics

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
STATES = (
    "done",
    "other",
    "running",
    "queued",
    "preempted",
    "stopped",
    "failed",
    "damaged",
    "missing",
)
IN_USE = " is in use by "  # in the line with which train.py refuses a run folder that another process holds
STOPPED = (
    REQUEUE,
    -signal.SIGTERM,
    -signal.SIGINT,
)  # saved and left; or asked to before it had begun
# killed, or, under srun, signalled before it could listen: not the run's own failure
KILLED = (
    -signal.SIGKILL,
    *(128 + number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)),
)
EXIT_LINE = re.compile(r"^# exit status (-?\d+)$")
SLURM_LINE = re.compile(r"^(srun|slurmstepd(-\S+)?): ")


@dataclass(frozen=True)
class Run:
    """One training run of a table: a cell and a seed, with its folder and its log."""

    table: str
    cell: Cell
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        """What the command printed, and its exit status."""
        return self.folder.parent / "logs" / f"{self.name}.log"

    def arguments(self) -> list[str]:
        """The overrides for train.py, Hydra's quoting included."""
        tags = ",".join(quoted(tag) for tag in (f"table={self.table}", f"cell={self.cell.name}"))
        return [
            *self.cell.overrides,
            f"seed={self.seed}",
            f"name={quoted(self.name)}",
            f"runs_dir={quoted(str(self.folder.parent))}",
            f"logger.group={quoted(self.table)}",
            f"logger.tags=[{tags}]",
        ]

    def command(self, overrides: Sequence[str] = ()) -> str:
        """The command as one types it in a shell, with further overrides."""
        return shlex.join(["python", "train.py", *self.arguments(), *overrides])


class Trained(Protocol):
    """What has a run folder and a log."""

    @property
    def folder(self) -> Path: ...

    @property
    def log(self) -> Path: ...


@dataclass(frozen=True)
class Standing:
    """Where a run stands. error: the last error line of a failed one, what is wrong with a damaged one; job: its task in SLURM's queue; note: what else."""

    state: str
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    error: str = ""
    job: str = ""
    note: str = ""

    def describe(self) -> str:
        if self.state in ("failed", "damaged"):
            return self.error
        parts = [f"job {self.job}"] if self.job else []
        parts += [f"step {self.step}/{self.total_steps}"] if self.step else []
        parts += [f"loss {self.loss:.4f}"] if self.loss is not None else []
        if self.seconds_left is not None and self.state == "running":
            parts.append(f"ETA {timedelta(seconds=round(self.seconds_left))}")
        parts += [self.note] if self.note else []
        return "  ".join(parts)


def quoted(text: str) -> str:
    """`text` as one value of Hydra's override grammar."""
    if re.fullmatch(r"[A-Za-z_./][\w./+-]*", text):
        return text
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"


def table_runs(
    table: Table, root: str | Path, chosen: dict[str, dict[str, Any]] | None = None
) -> list[Run]:
    """All runs of the table: every cell's first seed, then every cell's second, so that partial tables are of use."""
    cells = table.expand(chosen)
    return [
        Run(table.name, cell, seed, Path(root) / table.name / f"{cell.name}-s{seed}")
        for seed in range(table.seeds)
        for cell in cells
    ]


def reported_runs(table: Table, root: str | Path, results: str | Path) -> list[Run]:
    """All runs of the table; none while its search has chosen nothing, which leaves open what the table's runs are."""
    if table.tuned is not None and not chosen_path(table, results).is_file():
        return []
    return table_runs(table, root, read_chosen(table, results))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a completed run, else None. Raises DataError if it is damaged."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        summary = parse_summary(path.read_bytes())
    except Damaged as damage:
        raise folder_error(folder, damage) from None
    return summary if summary["completed"] else None


def check_folder(folder: Path) -> None:
    """Raises DataError naming the file of a finished run's folder that is damaged."""
    try:
        check_finished(
            lambda name: path.read_bytes() if (path := folder / name).is_file() else None
        )
    except Damaged as damage:
        raise folder_error(folder, damage) from None


def standing(run: Trained, held: bool | None = None) -> Standing:
    """Where the run stands, from its folder and log alone. held: whether a process trains it, None to ask its lock."""
    try:
        return _standing(run, held)
    except DataError as error:
        return Standing("damaged", error=str(error))


def _standing(run: Trained, held: bool | None) -> Standing:
    """The same. Raises DataError for files that are damaged."""
    if (summary := read_summary(run.folder)) is not None:
        check_folder(run.folder)
        return Standing("done", summary["steps"], summary["steps"], summary["loss"])
    status = last_exit_status(run.log)
    running = is_held(run.folder / ".lock") if held is None else held
    if not running and is_failure(status, error := last_error(run.log)):
        return Standing("failed", error=error)
    now = Standing("running" if running else "missing")
    try:
        rows = [
            row for row in read_metrics(run.folder / "metrics.jsonl") if row["event"] == "train"
        ]
        return _progress(run.folder, rows[-1], running) if rows else now
    except (
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        ValueError,
        yaml.YAMLError,
    ) as error:
        what = (
            f"metrics.jsonl or config.yaml is damaged ({type(error).__name__}: {first_line(error)})"
        )
        raise DataError(f"{run.folder}: {what}; remove the folder, and run again") from error


def _progress(folder: Path, row: dict[str, Any], running: bool) -> Standing:
    """Of an unfinished run, by its last row of training."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    total = round(row["step"] / row["epoch"] * config["epochs"])
    total = min(total, config.get("max_steps") or total)
    speed = row.get("images_per_second")  # not in the row of a start's first step
    left = (total - row["step"]) * row["images"] / row["step"] / speed if speed else None
    return Standing("running" if running else "stopped", row["step"], total, row["loss"], left)


def is_failure(status: int | None, error: str) -> bool:
    """Whether a run that ended so, with that last line, failed: it was neither stopped, nor killed by anything but a
    lack of memory, nor sent away because another process trains it."""
    if status in KILLED:
        return "oom" in error.lower()
    return status not in (None, 0, *STOPPED) and IN_USE not in error


def is_held(lock: Path) -> bool:
    """Whether the process that a run folder's lock names is alive. On another host: whether its metrics still grow."""
    holder = lock_holder(lock)
    if holder is None:
        return False
    host, pid = holder
    if host != socket.gethostname():
        metrics = lock.with_name("metrics.jsonl")
        return metrics.exists() and recently(metrics)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return is_training(pid)


def lock_holder(lock: Path) -> tuple[str, int] | None:
    """Host and process that a run folder's lock names."""
    try:
        host, _, pid = lock.read_text().split()
        return host, int(pid)
    except (OSError, ValueError):
        return None


def recently(path: Path, seconds: float = 600.0) -> bool:
    """Whether the file was written within the last `seconds`."""
    return time.time() - path.stat().st_mtime < seconds


def is_training(pid: int) -> bool:
    """Whether the process is a training run, not another that got a dead one's number; True where one cannot tell."""
    try:
        return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def last_exit_status(log: Path) -> int | None:
    """The exit status that the log ends with, None if it ends without one."""
    lines = log_lines(log)
    match = EXIT_LINE.match(lines[-1]) if lines else None
    return int(match[1]) if match else None


def last_error(log: Path) -> str:
    """The line of the log that tells why its run ended."""
    told = [line for line in own_lines(log) if not line.startswith(("$ ", "# "))]
    told = told or [line for line in log_lines(log) if SLURM_LINE.match(line)]
    return told[-1].removeprefix("error: ") if told else f"no output in {log}"


def own_lines(log: Path) -> list[str]:
    """The last lines of the log without those that only tell that it ended."""
    return [
        line
        for line in log_lines(log)
        if not EXIT_LINE.match(line)
        and "ended with the fault above" not in line
        and (not SLURM_LINE.match(line) or "oom" in line.lower())
    ]


def log_lines(log: Path) -> list[str]:
    """The lines of the log's end that are not empty."""
    if not log.is_file():
        return []
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20000))
        return [
            line for line in stream.read().decode(errors="replace").splitlines() if line.strip()
        ]


def chosen_path(table: Table, results: str | Path) -> Path:
    """Where a tuned table's search writes what it chooses."""
    return Path(results) / table.tuned.table / "chosen.json"


def read_chosen(table: Table, results: str | Path) -> dict[str, dict[str, Any]] | None:
    """What the table's search has chosen; None for a table without one. Raises ConfigError if it is not there yet."""
    if table.tuned is None:
        return None
    path = chosen_path(table, results)
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing: first scripts/reproduce.py run table={table.tuned.table}, "
            f"then scripts/reproduce.py choose table={table.tuned.table}"
        )
    return json.loads(path.read_text())["chosen"]
