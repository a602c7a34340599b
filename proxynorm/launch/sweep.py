"""A sweep under SLURM: submit the runs that are due as one array, and tell where each stands.

A plan file, slurm/plan-N.json beside the run folders, lists the runs of an array: {"job": its id,
"runs": [{name, folder, log, arguments}, …]}; task k trains entry k. slurm/.lock keeps a second
launch out until the plan is written, so that nothing is submitted twice.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from proxynorm.files import locked, write_json
from proxynorm.launch import slurm
from proxynorm.launch.runs import Run
from proxynorm.launch.slurm import SlurmOptions, Task
from proxynorm.launch.status import Status, lock_holder, own_lines, run_status

WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
USUAL_REASONS = ("None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Dependency")
# Endings that the next launch would most likely meet again.
FATAL = ("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
GOES_ON = "# goes on in "  # slurm/train.sbatch prints it before it turns to the run's log
Log = Callable[[str], None]


def plan_paths(runs_dir: Path) -> list[Path]:
    """The plan files, oldest first."""
    return sorted((runs_dir / "slurm").glob("plan-*.json"), key=plan_number)


def plan_number(plan: Path) -> int:
    return int(plan.stem.removeprefix("plan-"))


class Jobs:
    """SLURM's view of the runs in a folder: the tasks of each, and their state."""

    def __init__(self, runs_dir: Path) -> None:
        self.logs = runs_dir / "logs"
        plans = [json.loads(path.read_text()) for path in plan_paths(runs_dir)]
        plans = [plan for plan in plans if plan["job"]]
        # Asked before the run folders are read: a run that ends in between is done, not lost.
        self.queue = slurm.queue() if plans else {}
        self.tasks: dict[str, list[Task]] = {}
        for plan in plans:
            for index, run in enumerate(plan["runs"]):
                self.tasks.setdefault(run["name"], []).append((plan["job"], str(index)))
        queued = {job for job, _ in self.queue}
        self.endings = slurm.endings([plan["job"] for plan in plans if plan["job"] not in queued])

    def queued(self, name: str) -> Task | None:
        """The run's task in the queue."""
        return next((task for task in self.tasks.get(name, []) if task in self.queue), None)

    def status(self, run: Run) -> Status:
        """The run's status, from its folder and from SLURM."""
        task = self.queued(run.name)
        now = run_status(run, held=False if task is None and self.left_lock(run) else None)
        if now.state == "done":
            return now
        if task is not None:
            state, reason = self.queue[task]
            job = "_".join(task)
            if state not in WAITING:
                return replace(now, state="running", error="", job=job)
            note = "" if reason in USUAL_REASONS else reason
            state = "preempted" if now.step else "queued"
            return replace(now, state=state, error="", job=job, note=note)
        if now.state in ("missing", "stopped") and (error := self.failure(run.name)):
            return replace(now, state="failed", error=error)
        return now

    def left_lock(self, run: Run) -> bool:
        """Return whether a task that left the queue left its lock behind on another host."""
        holder = lock_holder(run.folder / ".lock")
        return run.name in self.tasks and holder is not None and holder[0] != socket.gethostname()

    def failure(self, name: str) -> str:
        """Why the run's last task failed outside of training: before its log, or by SLURM."""
        if name not in self.tasks:
            return ""
        job, index = self.tasks[name][-1]
        lines = own_lines(self.logs / f"slurm-{job}_{index}.log")
        if lines and not lines[-1].startswith(GOES_ON):
            return lines[-1].removeprefix("error: ")
        ending = self.endings.get((job, index))
        return f"SLURM: {ending}" if ending in FATAL else ""


def launch_array(
    runs: Sequence[Run],
    name: str,
    options: SlurmOptions,
    log: Log = print,
    announce: Callable[[Sequence[Run]], None] = lambda due: None,
) -> int:
    """Submit the runs that are neither finished nor queued nor running, and a report after them.

    announce gets the runs about to be submitted. Failed runs are submitted only with
    options.retry_failed. Returns the exit status: 1 if failed or damaged runs are left out, else
    0. Raises ConfigError if SLURM refuses.
    """
    slurm.requests(options)  # refuse impossible resources before anything is estimated
    runs_dir = runs[0].folder.parent
    if not options.dry_run:
        (runs_dir / "slurm").mkdir(parents=True, exist_ok=True)
        (runs_dir / "logs").mkdir(exist_ok=True)
    with nullcontext() if options.dry_run else locked(runs_dir / "slurm" / ".lock"):
        jobs = Jobs(runs_dir)
        statuses = [(run, jobs.status(run)) for run in runs]
        due = [run for run, now in statuses if is_due(run, now, options.retry_failed, log)]
        failed = [run for run, now in statuses if now.state == "failed" and run not in due]
        if due:
            announce(due)
            queued = {task[0] for run in runs if (task := jobs.queued(run.name))}
            submit(due, queued, name, options, log)
        else:
            log("nothing to submit")
    if failed:
        log(f"{len(failed)} failed runs are left out; retry_failed=true submits them again")
    return 1 if failed or any(now.state == "damaged" for _, now in statuses) else 0


def is_due(run: Run, now: Status, retry_failed: bool, log: Log) -> bool:
    """Return whether the run is to be submitted; logs why not."""
    if now.state in ("missing", "stopped") or (now.state == "failed" and retry_failed):
        return True
    where = f"{now.state} as job {now.job}" if now.job else "running elsewhere"
    words = {"done": "finished", "failed": f"failed: {now.error}", "damaged": now.error}
    log(f"{run.name}: {words.get(now.state, where)}")
    return False


def submit(
    due: Sequence[Run], queued: set[str], name: str, options: SlurmOptions, log: Log
) -> None:
    """Write the plan and submit its array, then the report after it and after the `queued` jobs."""
    runs_dir = due[0].folder.parent
    former, logs = plan_paths(runs_dir), runs_dir / "logs"
    plan = runs_dir / "slurm" / f"plan-{plan_number(former[-1]) + 1 if former else 1}.json"
    command = slurm.array_command(plan, len(due), name, logs, options)
    if options.dry_run:
        log(str(command))
        for index, run in enumerate(due):
            log(f"  [{index}] {run.command}")
        if options.report:
            log(str(slurm.report_command(sorted({"ARRAY", *queued}), name, logs, options)))
        return
    job = submit_plan(command, plan, due)
    log(f"submitted array {job} of {len(due)} runs: {plan}")
    if options.report:
        report = slurm.report_command(sorted({job, *queued}), name, logs, options).submit()
        log(f"submitted job {report}, the report after it: {logs}/slurm-report-{report}.log")


def submit_plan(command: slurm.Command, plan: Path, due: Sequence[Run]) -> str:
    """Write the plan, submit it and add the array's job id to it."""
    runs = [
        {
            "name": run.name,
            "folder": str(run.folder),
            "log": str(run.log),
            "arguments": run.arguments,
        }
        for run in due
    ]
    write_json(plan, {"job": None, "runs": runs})
    try:
        job = command.submit()
    except BaseException:
        plan.unlink()
        raise
    write_json(plan, {"job": job, "runs": runs})
    return job
