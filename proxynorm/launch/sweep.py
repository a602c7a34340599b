"""A sweep under SLURM: its plan files, where each run stands, and the submission of what is missing as an array.

A plan lies beside the run folders, in slurm/plan-N.json: {"job": the array's id, "runs": [{name, folder, log,
arguments}, …]}; array task k trains entry k. Whoever decides what to submit holds slurm/.lock until the new plan is written, so that two launches
at once submit nothing twice; were they to, the lock of the run folder would let only one train.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from proxynorm.files import locked, write_json
from proxynorm.launch import slurm
from proxynorm.launch.runs import Run, Standing, lock_holder, own_lines, standing
from proxynorm.launch.slurm import Command, SlurmOptions, Task

if TYPE_CHECKING:
    from proxynorm.launch.local import LaunchOptions

WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
USUAL_REASONS = ("None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Dependency")
FATAL = (
    "FAILED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)  # ends that the next launch would most likely meet again
GOES_ON = "# goes on in "  # what slurm/train.sbatch says before it turns to the run's log
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A run as a plan lists it: the arguments are train.py's. cell: of a table's run, its cell's name."""

    name: str
    folder: Path
    log: Path
    arguments: tuple[str, ...]
    cell: str = ""

    def as_json(self) -> dict:
        return {
            "name": self.name,
            "folder": str(self.folder),
            "log": str(self.log),
            "arguments": self.arguments,
        }


def as_entry(run: Run, overrides: Sequence[str] = ()) -> Entry:
    """A table's run, with further overrides."""
    return Entry(run.name, run.folder, run.log, (*run.arguments(), *overrides), run.cell.name)


@dataclass(frozen=True)
class Plan:
    """A submitted array: its job and the names of its runs, by index."""

    job: str
    names: tuple[str, ...]


def sweep_folder(runs_dir: Path) -> Path:
    return runs_dir / "slurm"


def plan_paths(runs_dir: Path) -> list[Path]:
    """The plan files, oldest first."""
    paths = sweep_folder(runs_dir).glob("plan-*.json")
    return sorted((path for path in paths if re.fullmatch(r"plan-\d+", path.stem)), key=number)


def number(plan: Path) -> int:
    return int(plan.stem.removeprefix("plan-"))


def read_plans(runs_dir: Path) -> list[Plan]:
    """The arrays that were submitted for the run folders in `runs_dir`, oldest first."""
    contents = [json.loads(path.read_text()) for path in plan_paths(runs_dir)]
    return [
        Plan(content["job"], tuple(run["name"] for run in content["runs"]))
        for content in contents
        if content["job"]
    ]


# -- where the runs stand ---------------------------------------------------------------------------------------------


class Jobs:
    """What SLURM knows of the runs in a folder: the task that trains or trained each, and the task's state."""

    def __init__(self, runs_dir: Path) -> None:
        self.logs = runs_dir / "logs"
        plans = read_plans(runs_dir)
        # asked before the run folders are read: what ends in between is seen as done, not as lost
        self.queue = slurm.queue() if plans else {}
        self.tasks: dict[str, list[Task]] = {}
        for plan in plans:
            for index, name in enumerate(plan.names):
                self.tasks.setdefault(name, []).append((plan.job, str(index)))
        queued = {job for job, _ in self.queue}
        self.endings = (
            slurm.endings([plan.job for plan in plans if plan.job not in queued]) if plans else {}
        )

    def queued(self, name: str) -> Task | None:
        """The run's task in the queue."""
        return next((task for task in self.tasks.get(name, []) if task in self.queue), None)

    def standing(self, run: Run | Entry) -> Standing:
        """Where the run stands, from its folder and from SLURM."""
        task = self.queued(run.name)
        now = standing(run, held=False if task is None and self.has_left(run) else None)
        if now.state == "done":
            return now
        if task is not None:
            waits = self.queue[task].state in WAITING
            state = ("preempted" if now.step else "queued") if waits else "running"
            note = (
                self.queue[task].reason
                if waits and self.queue[task].reason not in USUAL_REASONS
                else ""
            )
            return replace(now, state=state, error="", job="_".join(task), note=note)
        if now.state in ("missing", "stopped") and (error := self.failure(run.name)):
            return replace(now, state="failed", error=error)
        return now

    def has_left(self, run: Run | Entry) -> bool:
        """Whether the lock is one that a task, gone from the queue, left behind on another host."""
        holder = lock_holder(run.folder / ".lock")
        return run.name in self.tasks and holder is not None and holder[0] != socket.gethostname()

    def failure(self, name: str) -> str:
        """Why the run's last task failed outside of training: in SLURM's accounts, or before its log was opened."""
        if not self.tasks.get(name):
            return ""
        job, index = self.tasks[name][-1]
        lines = own_lines(self.logs / f"slurm-{job}_{index}.log")
        ending = self.endings.get((job, index))
        if lines and not lines[-1].startswith(GOES_ON):
            return lines[-1].removeprefix("error: ")
        return f"SLURM: {ending}" if ending in FATAL else ""


# -- submitting -------------------------------------------------------------------------------------------------------


def run_on_slurm(runs: Sequence[Run], options: LaunchOptions) -> int:
    """Submit the table's runs that are missing or stopped as one array; see `launch_array`."""
    entries = [as_entry(run, options.overrides) for run in runs]
    return launch_array(
        entries, runs[0].folder.parent, runs[0].table, options.slurm, options.say, options.check
    )


def launch_array(
    entries: Sequence[Entry],
    runs_dir: Path,
    name: str,
    options: SlurmOptions,
    say: Say,
    check: Callable[[Sequence[Entry]], None] | None = None,
) -> int:
    """Submit what neither is finished nor queued nor being trained, and a report after it.

    check gets the runs that are about to be submitted, and raises to refuse. Runs that failed are listed, and submitted
    only if options.retry_failed; damaged ones are listed. Returns the exit status: 1 if such runs are left, else 0. Raises ConfigError if
    SLURM refuses.
    """
    slurm.requests(options)  # refuses what cannot be asked for before anything is estimated
    with nullcontext() if options.dry_run else submitting(runs_dir):
        jobs = Jobs(runs_dir)
        standings = [(entry, jobs.standing(entry)) for entry in entries]
        due = [entry for entry, now in standings if is_due(entry, now, options.retry_failed, say)]
        failed = [entry for entry, now in standings if now.state == "failed" and entry not in due]
        damaged = [entry for entry, now in standings if now.state == "damaged"]
        if due:
            if check:
                check(due)
            queued = {task[0] for entry in entries if (task := jobs.queued(entry.name))}
            submit(due, queued, runs_dir, name, options, say)
        else:
            say("nothing to submit")
    if failed:
        say(f"{len(failed)} failed runs are left out; retry_failed=true submits them again")
    return 1 if failed or damaged else 0


@contextmanager
def submitting(runs_dir: Path) -> Iterator[None]:
    """Make the folders of plans and logs, and hold the lock of whoever decides what to submit."""
    folder = sweep_folder(runs_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (runs_dir / "logs").mkdir(exist_ok=True)
    with locked(folder / ".lock"):
        yield


def is_due(entry: Entry, now: Standing, retry_failed: bool, say: Say) -> bool:
    """Whether the run is to be submitted; says why not."""
    if now.state in ("missing", "stopped") or (now.state == "failed" and retry_failed):
        return True
    where = f"{now.state} as job {now.job}" if now.job else "running elsewhere"
    words = {"done": "finished", "failed": f"failed: {now.error}", "damaged": now.error}
    say(f"{entry.name}: {words.get(now.state, where)}")
    return False


def submit(
    due: Sequence[Entry],
    queued: set[str],
    runs_dir: Path,
    name: str,
    options: SlurmOptions,
    say: Say,
) -> None:
    """Write the plan, submit its array, and the report after it and after the arrays that are `queued`; or only say so."""
    former, folder = plan_paths(runs_dir), sweep_folder(runs_dir)
    plan = folder / f"plan-{number(former[-1]) + 1 if former else 1}.json"
    logs = runs_dir / "logs"
    command = slurm.array_command(plan, len(due), name, logs, options)
    if options.dry_run:
        say(str(command))
        for index, entry in enumerate(due):
            say(f"  [{index}] {shlex.join(['python', 'train.py', *entry.arguments])}")
        if options.report:
            say(str(slurm.report_command(sorted({"ARRAY", *queued}), name, logs, options)))
        return
    job = submit_planned(command, plan, due)
    say(f"submitted array {job} of {len(due)} runs: {plan}")
    if options.report:
        report = slurm.report_command(sorted({job, *queued}), name, logs, options).submit()
        say(f"submitted job {report}, the report after it: {logs}/slurm-report-{report}.log")


def submit_planned(command: Command, plan: Path, due: Sequence[Entry]) -> str:
    """Write the plan, submit it and note the array's job id in it."""
    content = {"job": None, "runs": [entry.as_json() for entry in due]}
    write_json(plan, content)
    try:
        job = command.submit()
    except BaseException:
        plan.unlink()
        raise
    write_json(plan, {**content, "job": job})
    return job
