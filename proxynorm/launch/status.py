"""The status of a run, read from its folder and its log, and the checks of a folder's files."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from proxynorm.errors import DataError
from proxynorm.launch.runs import Run
from proxynorm.train.preemption import REQUEUE

STATES = "done other running queued preempted stopped failed damaged missing".split()
SILENT_SECONDS = 600  # a run on another machine counts as dead after that long without a row
IN_USE = " is in use by "  # in train.py's error if another process holds the run folder
# Exit statuses that are no failure: finished, or stopped on request (saved, or not yet training).
STOPPED = (0, REQUEUE, -signal.SIGTERM, -signal.SIGINT)
# Exit statuses of a run that was killed, or signalled under srun before it handled signals.
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
KILLED = (-signal.SIGKILL, *(128 + number for number in SIGNALS))
EXIT_LINE = re.compile(r"^# exit status (-?\d+)$")
# Lines that only report the end: the launchers' own, and train.py's last one after a traceback.
END_LINE = re.compile(r"^# exit status|.*ended with the fault above")
SLURM_LINE = re.compile(r"^(srun|slurmstepd(-\S+)?): ")

# The files of a run that are archived.
RUN_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "summary.json")


@dataclass(frozen=True)
class Status:
    """The state of a run, one of STATES, with details.

    progress: step, loss, top-1 and time left, as far as known
    error:    the last error line of a failed run, or what is damaged
    job:      its task in SLURM's queue
    note:     anything else worth showing
    """

    state: str
    progress: str = ""
    error: str = ""
    job: str = ""
    note: str = ""

    def describe(self) -> str:
        """Return the details in one line; for a failed or damaged run, only the error."""
        job = f"job {self.job}" if self.job else ""
        return self.error or "  ".join(filter(None, [job, self.progress, self.note]))


@contextmanager
def reading(path: Path, part: str = "") -> Iterator[None]:
    """Raise DataError, in one line, if the block fails to read `path`, or `part` of a folder."""
    try:
        yield
    except Exception as error:  # damaged content can raise anything
        reason = " ".join(f"{part}: {error}".split()).removeprefix(": ")
        raise DataError(f"{path} is damaged ({reason}); remove it and run again") from error


def finished_files(folder: Path) -> dict[str, bytes] | None:
    """Read the RUN_FILES of a finished run. None if it has not finished. Raises DataError."""
    summary = folder / "summary.json"
    if not summary.is_file():
        return None
    # If this file is damaged, it is enough to remove it: the run continues from its checkpoint.
    with reading(summary):
        if not json.loads(summary.read_bytes())["completed"]:
            return None
    with reading(folder):
        return {name: (folder / name).read_bytes() for name in RUN_FILES}


def read_progress(folder: Path) -> dict[str, Any] | None:
    """Read the last training row of the run in `folder`; None before its first row.

    Adds `total`, the steps of the whole run, to the row. Raises DataError.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    with reading(folder, path.name):
        complete = path.read_bytes().rpartition(b"\n")[0]  # the last line may be unfinished
        rows = [row for row in map(json.loads, complete.splitlines()) if row["event"] == "train"]
    if not rows:
        return None
    with reading(folder, "config.yaml"):
        config = yaml.safe_load((folder / "config.yaml").read_bytes())
        total = round(rows[-1]["step"] / rows[-1]["epoch"] * config["epochs"])
        return {**rows[-1], "total": min(total, config.get("max_steps") or total)}


def done_status(summary: dict[str, Any], note: str = "") -> Status:
    """Return the status of a finished run with this summary."""
    steps = summary["steps"]
    text = progress_text(steps, steps, summary["loss"], summary["top1"])
    return Status("done", text, note=note)


def progress_text(step: int, total: int, loss: float | None, top1: float | None = None) -> str:
    """Format the step, and loss and top-1 if they are finite."""
    parts = [f"step {step}/{total}"]
    parts += [f"loss {loss:.4f}"] if loss is not None else []
    parts += [f"top1 {top1:.2f}"] if top1 is not None else []
    return "  ".join(parts)


def run_status(run: Run, elsewhere: bool = True) -> Status:
    """Return the status of a run.

    elsewhere: whether a process on another machine may be training it.
    """
    try:
        if (files := finished_files(run.folder)) is not None:
            with reading(run.folder / "summary.json"):
                return done_status(json.loads(files["summary.json"]))
        running = is_held(run.folder / ".lock", elsewhere)
        lines = log_lines(run.log)
        exited = EXIT_LINE.match(lines[-1]) if lines else None
        if exited and not running and is_failure(int(exited[1]), error := last_error(run.log)):
            return Status("failed", error=error)
        progress = read_progress(run.folder)
    except DataError as error:
        return Status("damaged", error=str(error))
    if progress is None:
        return Status("running" if running else "missing")
    text = progress_text(progress["step"], progress["total"], progress["loss"])
    if running and "eta_seconds" in progress:  # absent from the first row after a start
        text += f"  ETA {timedelta(seconds=round(progress['eta_seconds']))}"
    return Status("running" if running else "stopped", text)


def is_failure(exit_status: int, error: str) -> bool:
    """Return whether a run with this exit status and last error line failed by itself.

    Not failures: a requested stop, a kill (except for lack of memory), and a refusal because
    another process is training the run.
    """
    if exit_status in KILLED:
        return "oom" in error.lower()
    return exit_status not in STOPPED and IN_USE not in error


def is_held(lock: Path, elsewhere: bool) -> bool:
    """Return whether the process named in a run folder's lock file is alive.

    A process on another machine counts as alive while the metrics grow, if `elsewhere`.
    """
    try:
        host, _, pid = lock.read_text().split()
        if host == socket.gethostname():
            # The process id of a dead run may belong to another program by now.
            return b"train" in Path(f"/proc/{int(pid)}/cmdline").read_bytes()
        silent = time.time() - lock.with_name("metrics.jsonl").stat().st_mtime
        return elsewhere and silent < SILENT_SECONDS
    except (OSError, ValueError):
        return False


def last_error(log: Path) -> str:
    """Return the line of the log that explains why its run ended."""
    lines = [line for line in relevant_lines(log) if not line.startswith(("$ ", "# "))]
    lines = lines or [line for line in log_lines(log) if SLURM_LINE.match(line)]
    return lines[-1].removeprefix("error: ") if lines else "no output"


def relevant_lines(log: Path) -> list[str]:
    """Return the last lines of the log without those that only report the end."""
    return [
        line
        for line in log_lines(log)
        if not END_LINE.match(line) and (not SLURM_LINE.match(line) or "oom" in line.lower())
    ]


def log_lines(log: Path) -> list[str]:
    """Return the non-empty lines at the end of the log; none if there is no log."""
    if not log.is_file():
        return []
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20000))
        lines = stream.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()]
