"""The status of a run, from its folder and its log."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from proxynorm.errors import DataError
from proxynorm.launch.finished import finished_files, parse
from proxynorm.launch.runs import Run
from proxynorm.train.preemption import REQUEUE

STATES = "done other running queued preempted stopped failed damaged missing".split()
IN_USE = " is in use by "  # how train.py refuses a run folder that another process holds
FAULT_LINE = "ended with the fault above"  # train.py's last line after a traceback
# Exit statuses after a requested stop: saved, or stopped before training began.
STOPPED = (REQUEUE, -signal.SIGTERM, -signal.SIGINT)
# Killed, or signalled under srun before the handlers were installed: not the run's own failure.
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
KILLED = (-signal.SIGKILL, *(128 + number for number in SIGNALS))
EXIT_LINE = re.compile(r"^# exit status (-?\d+)$")
SLURM_LINE = re.compile(r"^(srun|slurmstepd(-\S+)?): ")


@dataclass(frozen=True)
class Status:
    """The state of a run, one of STATES.

    progress: step, loss, top-1 and time left, as far as known; error: the last error line of a
    failed run, the reason for a damaged one; job: its task in SLURM's queue; note: anything else
    worth showing.
    """

    state: str
    progress: str = ""
    error: str = ""
    job: str = ""
    note: str = ""

    def describe(self) -> str:
        """The progress, or the error, in one line."""
        job = f"job {self.job}" if self.job else ""
        return self.error or "  ".join(filter(None, [job, self.progress, self.note]))


def done_status(summary: dict[str, Any], note: str = "") -> Status:
    """The status of a finished run with this summary."""
    steps = summary["steps"]
    return Status("done", progress(steps, steps, summary["loss"], summary["top1"]), note=note)


def progress(step: int, total: int, loss: float | None, top1: float | None = None) -> str:
    """The step, and what is finite of the loss and top-1, in words."""
    words = [f"step {step}/{total}"]
    words += [f"loss {loss:.4f}"] if loss is not None else []
    words += [f"top1 {top1:.2f}"] if top1 is not None else []
    return "  ".join(words)


def run_status(run: Run, elsewhere: bool = True) -> Status:
    """The status of a run. elsewhere: whether another machine may train it."""
    try:
        if (files := finished_files(run.folder)) is not None:
            return done_status(json.loads(files["summary.json"]))
        running = is_held(run.folder / ".lock", elsewhere)
        lines = log_lines(run.log)
        exited = EXIT_LINE.match(lines[-1]) if lines else None
        if exited and not running:
            error = last_error(run.log)
            if is_failure(int(exited[1]), error):
                return Status("failed", error=error)
        return unfinished_status(run.folder, running)
    except DataError as error:
        return Status("damaged", error=str(error))


def unfinished_status(folder: Path, running: bool) -> Status:
    """The status of an unfinished run, by its last training row. Raises DataError."""
    try:
        row = last_training_row(folder)
        if row is None:
            return Status("running" if running else "missing")
        step, (epochs, most) = row["step"], read_config(folder)
        total = round(step / row["epoch"] * epochs)
        total = min(total, most or total)
        words = progress(step, total, row["loss"])
        speed = row.get("images_per_second")  # absent from the first row after a start
        if running and speed:
            left = (total - step) * row["images"] / step / speed
            words += f"  ETA {timedelta(seconds=round(left))}"
        return Status("running" if running else "stopped", words)
    except (ValueError, OSError, LookupError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{folder}: metrics.jsonl or config.yaml is damaged ({reason}); "
            "remove the folder and run again"
        ) from None


def last_training_row(folder: Path) -> dict[str, Any] | None:
    """The last complete training row of metrics.jsonl, which may just be growing."""
    path = folder / "metrics.jsonl"
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    rows = parse({path.name: whole}, path.name)
    return next((row for row in reversed(rows) if row["event"] == "train"), None)


def read_config(folder: Path) -> tuple[float, int | None]:
    """epochs and max_steps of a run folder's configuration. Raises Damaged, OSError."""
    files = {"config.yaml": (folder / "config.yaml").read_bytes()}
    (config,) = parse(files, "config.yaml")
    return config["epochs"], config.get("max_steps")


def is_failure(status: int, error: str) -> bool:
    """Return whether a run with this exit status and last line failed by itself.

    Not failures: a requested stop, a kill for any reason but lack of memory, and a refusal
    because another process trains the run.
    """
    if status in KILLED:
        return "oom" in error.lower()
    return status not in (0, *STOPPED) and IN_USE not in error


def is_held(lock: Path, elsewhere: bool) -> bool:
    """Return whether the process that a run folder's lock file names is alive.

    Another machine's process cannot be asked, but its metrics grow while it trains; none counts
    unless `elsewhere`.
    """
    try:
        host, _, pid = lock.read_text().split()
        if host == socket.gethostname():
            # The process id of a dead run may belong to another program by now.
            return b"train" in Path(f"/proc/{int(pid)}/cmdline").read_bytes()
        return elsewhere and time.time() - lock.with_name("metrics.jsonl").stat().st_mtime < 600
    except (OSError, ValueError):
        return False


def last_error(log: Path) -> str:
    """The log's line that explains why its run ended."""
    told = [line for line in own_lines(log) if not line.startswith(("$ ", "# "))]
    told = told or [line for line in log_lines(log) if SLURM_LINE.match(line)]
    return told[-1].removeprefix("error: ") if told else f"no output in {log}"


def own_lines(log: Path) -> list[str]:
    """The last lines of the log without those that only report the end."""
    return [
        line
        for line in log_lines(log)
        if not EXIT_LINE.match(line)
        and FAULT_LINE not in line
        and (not SLURM_LINE.match(line) or "oom" in line.lower())
    ]


def log_lines(log: Path) -> list[str]:
    """The non-empty lines at the log's end."""
    if not log.is_file():
        return []
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20000))
        text = stream.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]
