"""A sweep under SLURM: submit the runs that are due as one array, and tell where each stands.

A plan file, slurm/plan-N.json beside the run folders, lists the runs of an array: {"job": its id,
"runs": [{name, folder, log, arguments}, …]}; task k trains entry k. slurm/.lock keeps a second
launch out until the plan is written, so that nothing is submitted twice.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from proxynorm.files import locked, write_json
from proxynorm.launch import slurm
from proxynorm.launch.estimate import Estimate, describe
from proxynorm.launch.runs import Run, say
from proxynorm.launch.slurm import SlurmOptions, Task
from proxynorm.launch.status import Status, own_lines, run_status

WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
USUAL_REASONS = ("None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Dependency")
GOES_ON = "# goes on in "  # slurm/train.sbatch prints it before it turns to the run's log


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
        # Asked before the run folders are read: a run that ends in between is done, not lost.
        self.queue = slurm.queue() if plans else {}
        self.tasks: dict[str, list[Task]] = {}
        for plan in plans:
            for index, run in enumerate(plan["runs"] if plan["job"] else []):
                self.tasks.setdefault(run["name"], []).append((plan["job"], str(index)))

    def queued(self, name: str) -> Task | None:
        """The run's task in the queue."""
        return next((task for task in self.tasks.get(name, []) if task in self.queue), None)

    def status(self, run: Run) -> Status:
        """The run's status, from its folder and from SLURM."""
        task = self.queued(run.name)
        # A task that has left the queue may have left its lock behind, on the node it ran on.
        now = run_status(run, elsewhere=task is not None or run.name not in self.tasks)
        if now.state == "done":
            return now
        if task is not None:
            state, reason = self.queue[task]
            now = replace(now, error="", job="_".join(task))
            if state not in WAITING:
                return replace(now, state="running")
            note = "" if reason in USUAL_REASONS else reason
            return replace(now, state="preempted" if now.progress else "queued", note=note)
        if now.state in ("missing", "stopped") and (error := self.failure(run.name)):
            return replace(now, state="failed", error=error)
        return now

    def failure(self, name: str) -> str:
        """Why the run's last task failed before it turned to the run's log, or by SLURM."""
        if name not in self.tasks:
            return ""
        lines = own_lines(self.logs / f"slurm-{'_'.join(self.tasks[name][-1])}.log")
        failed = lines and not lines[-1].startswith(GOES_ON)
        return lines[-1].removeprefix("error: ") if failed else ""


def launch_array(
    runs: Sequence[Run],
    name: str,
    options: SlurmOptions,
    estimate: Callable[[Run], Estimate],
    report: Sequence[str] = (),
) -> int:
    """Submit the runs that are neither finished nor queued nor running, and a report after them.

    Prints what they will take first. Failed runs are submitted only with options.retry_failed.
    report: arguments of scripts/reproduce.py; none: no report. Returns the exit status: 1 if
    failed or damaged runs are left out, else 0. Raises ConfigError if SLURM refuses.
    """
    slurm.requests(options)  # refuse impossible resources first
    runs_dir = runs[0].folder.parent
    if not options.dry_run:
        (runs_dir / "slurm").mkdir(parents=True, exist_ok=True)
        (runs_dir / "logs").mkdir(exist_ok=True)
    with nullcontext() if options.dry_run else locked(runs_dir / "slurm" / ".lock"):
        jobs = Jobs(runs_dir)
        statuses = [(run, jobs.status(run)) for run in runs]
        due = [run for run, now in statuses if is_due(run, now, options.retry_failed)]
        failed = [run for run, now in statuses if now.state == "failed" and run not in due]
        say(describe(due, estimate) if due else "nothing to submit")
        if due:
            queued = {task[0] for run in runs if (task := jobs.queued(run.name))}
            submit(due, queued, name, options, report)
    if failed:
        say(f"{len(failed)} failed runs are left out; retry_failed=true submits them again")
    return 1 if failed or any(now.state == "damaged" for _, now in statuses) else 0


def is_due(run: Run, now: Status, retry_failed: bool) -> bool:
    """Return whether the run is to be submitted; prints why not."""
    if now.state in ("missing", "stopped") or (now.state == "failed" and retry_failed):
        return True
    where = f"{now.state} as job {now.job}" if now.job else "running elsewhere"
    words = {"done": "finished", "failed": f"failed: {now.error}", "damaged": now.error}
    say(f"{run.name}: {words.get(now.state, where)}")
    return False


def submit(
    due: Sequence[Run], queued: set[str], name: str, options: SlurmOptions, report: Sequence[str]
) -> None:
    """Write the plan and submit its array, then the report after it and after the `queued` jobs."""
    runs_dir = due[0].folder.parent
    former, logs = plan_paths(runs_dir), runs_dir / "logs"
    plan = runs_dir / "slurm" / f"plan-{plan_number(former[-1]) + 1 if former else 1}.json"
    command, job = slurm.array_command(plan, len(due), name, logs, options), "ARRAY"
    if options.dry_run:
        say(shlex.join(command))
        for index, run in enumerate(due):
            say(f"  [{index}] {run.command}")
    else:
        job = submit_plan(command, plan, due)
        say(f"submitted array {job} of {len(due)} runs: {plan}")
    if not report:
        return
    command = slurm.report_command(sorted({job, *queued}), name, logs, options, report)
    if options.dry_run:
        say(shlex.join(command))
    else:
        job = slurm.submit(command)
        say(f"submitted job {job}, the report after it: {logs}/slurm-report-{job}.log")


def submit_plan(command: Sequence[str], plan: Path, due: Sequence[Run]) -> str:
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
        job = slurm.submit(command)
    except BaseException:
        plan.unlink()
        raise
    write_json(plan, {"job": job, "runs": runs})
    return job
