"""The status of a run, from its folder, whose files are read and checked here, and its log."""

from __future__ import annotations

import json
import lzma
import re
import signal
import socket
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from proxynorm.errors import DataError, ProxynormError
from proxynorm.launch.runs import Run
from proxynorm.train.preemption import REQUEUE

STATES = "done other running queued preempted stopped failed damaged missing".split()
IN_USE = " is in use by "  # how train.py refuses a run folder that another process holds
# Exit statuses after a requested stop: saved, or stopped before training began.
STOPPED = (0, REQUEUE, -signal.SIGTERM, -signal.SIGINT)
# Killed, or signalled under srun before the handlers were installed: not the run's own failure.
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
KILLED = (-signal.SIGKILL, *(128 + number for number in SIGNALS))
EXIT_LINE = re.compile(r"^# exit status (-?\d+)$")
# Lines that only report the end: the launchers' own, and train.py's last one after a traceback.
END_LINE = re.compile(r"^# exit status|.*ended with the fault above")
SLURM_LINE = re.compile(r"^(srun|slurmstepd(-\S+)?): ")

# The files that are kept of a run, with the keys that readers rely on.
KEPT = {
    "config.yaml": {"seed", "epochs"},
    "environment.json": {"python", "processor", "cores", "threads", "gpus", "packages", "git"},
    "metrics.jsonl": {"event", "step", "epoch"},
    "summary.json": {"completed", "steps", "total_steps", "top1", "loss", "train_seconds"},
}
READ_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError)
READ_ERRORS += (EOFError, yaml.YAMLError, tarfile.TarError, lzma.LZMAError, ProxynormError)


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


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Raise DataError, in one line, if the block finds `place`, a file or folder, damaged."""
    try:
        yield
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place} is damaged ({reason}); remove it and run again") from error


def finished_files(folder: Path) -> dict[str, bytes] | None:
    """Read the files KEPT of a completed run; None if it is not completed. Raises DataError."""
    files = {name: (folder / name).read_bytes() for name in KEPT if (folder / name).is_file()}
    if "summary.json" not in files:
        return None
    with reading(folder / "summary.json"):  # without it, the run continues from its checkpoint
        (summary,) = parse(files, "summary.json")
    if not summary["completed"]:
        return None
    with reading(folder):
        check_files(files)
    return files


def check_files(files: Mapping[str, bytes]) -> None:
    """Raise ValueError unless the files KEPT of a finished run are there, parse and agree."""
    parsed = {name: parse(files, name) for name in KEPT}
    (summary,) = parsed["summary.json"]
    evaluations = [row for row in parsed["metrics.jsonl"] if row["event"] == "eval"]
    last = evaluations[-1] if evaluations else {}
    # Metrics cut between two lines still parse, but lack the evaluation of the summary.
    if [last.get(key) for key in ("step", "top1", "loss")] != [
        summary[key] for key in ("steps", "top1", "loss")
    ]:
        raise ValueError("metrics.jsonl: its last evaluation is not that of summary.json")


def parse(files: Mapping[str, bytes], name: str) -> list[dict[str, Any]]:
    """Parse a file: its rows or its one mapping, with the keys of KEPT. Raises ValueError."""
    if name not in files:
        raise ValueError(f"{name} is missing")
    parts = files[name].splitlines() if name == "metrics.jsonl" else [files[name]]
    try:
        values = [(yaml.safe_load if name == "config.yaml" else json.loads)(part) for part in parts]
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    for value in values:
        if not isinstance(value, dict) or KEPT[name] - value.keys():
            raise ValueError(f"{name}: not an object with {', '.join(sorted(KEPT[name]))}")
    return values


class Progress(NamedTuple):
    """How far a run is, by its last training row. images: of a step; speed: images a second."""

    step: int
    total: int
    images: float
    loss: float | None
    speed: float | None  # absent from the first row after a start

    def seconds(self, steps: int) -> float | None:
        """The time that so many steps take, if it is known."""
        return steps * self.images / self.speed if self.speed else None


def read_progress(folder: Path) -> Progress | None:
    """The progress of the run in `folder`; None before its first row. Raises DataError."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    with reading(folder):
        # The last line may just be growing.
        lines = path.read_bytes().rpartition(b"\n")[0]
        rows = [row for row in parse({path.name: lines}, path.name) if row["event"] == "train"]
        if not rows:
            return None
        (config,) = parse({"config.yaml": (folder / "config.yaml").read_bytes()}, "config.yaml")
        row, step = rows[-1], rows[-1]["step"]
        total = round(step / row["epoch"] * config["epochs"])
        total = min(total, config.get("max_steps") or total)
        speed = row.get("images_per_second")
        return Progress(step, total, row["images"] / step, row["loss"], speed)


def done_status(summary: dict[str, Any], note: str = "") -> Status:
    """The status of a finished run with this summary."""
    steps = summary["steps"]
    return Status("done", words(steps, steps, summary["loss"], summary["top1"]), note=note)


def words(step: int, total: int, loss: float | None, top1: float | None = None) -> str:
    """The step, and what is finite of the loss and top-1, in words."""
    figures = [f"loss {loss:.4f}"] if loss is not None else []
    figures += [f"top1 {top1:.2f}"] if top1 is not None else []
    return "  ".join([f"step {step}/{total}", *figures])


def run_status(run: Run, elsewhere: bool = True) -> Status:
    """The status of a run. elsewhere: whether another machine may train it."""
    try:
        if (files := finished_files(run.folder)) is not None:
            return done_status(json.loads(files["summary.json"]))
        running = is_held(run.folder / ".lock", elsewhere)
        lines = log_lines(run.log)
        exited = EXIT_LINE.match(lines[-1]) if lines else None
        if exited and not running and is_failure(int(exited[1]), error := last_error(run.log)):
            return Status("failed", error=error)
        if (now := read_progress(run.folder)) is None:
            return Status("running" if running else "missing")
        text, left = words(now.step, now.total, now.loss), now.seconds(now.total - now.step)
        if running and left is not None:
            text += f"  ETA {timedelta(seconds=round(left))}"
        return Status("running" if running else "stopped", text)
    except DataError as error:
        return Status("damaged", error=str(error))


def is_failure(status: int, error: str) -> bool:
    """Return whether a run with this exit status and last line failed by itself.

    Not failures: a requested stop, a kill for any reason but lack of memory, and a refusal
    because another process trains the run.
    """
    if status in KILLED:
        return "oom" in error.lower()
    return status not in STOPPED and IN_USE not in error


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
    return told[-1].removeprefix("error: ") if told else "no output"


def own_lines(log: Path) -> list[str]:
    """The last lines of the log without those that only report the end."""
    return [
        line
        for line in log_lines(log)
        if not END_LINE.match(line) and (not SLURM_LINE.match(line) or "oom" in line.lower())
    ]


def log_lines(log: Path) -> list[str]:
    """The non-empty lines at the log's end."""
    if not log.is_file():
        return []
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20000))
        return [
            line for line in stream.read().decode(errors="replace").splitlines() if line.strip()
        ]
