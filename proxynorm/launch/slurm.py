"""Runs under SLURM: submit those that are due as one array, and tell where each stands.

A plan file, slurm/plan-N.json beside the run folders, lists the runs of an array: {"job": its id,
"runs": [{name, log, arguments}, …]}; task k trains entry k. slurm/.lock keeps a second launch out
until the plan is written, so that nothing is submitted twice.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from proxynorm.cli import option
from proxynorm.errors import ConfigError
from proxynorm.files import locked, write_json
from proxynorm.launch.estimate import describe, estimator
from proxynorm.launch.runs import Run, say
from proxynorm.launch.status import Status, own_lines, run_status

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT, REPORT_SCRIPT = ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "report.sbatch"
# Arguments of sbatch that the report's job shares with the runs.
FOR_REPORT = ("--account=", "--partition=", "--qos=", "--reservation=")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
USUAL_REASONS = ("None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Dependency")
GOES_ON = "# goes on in "  # slurm/train.sbatch prints it before it turns to the run's log
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


class Jobs:
    """SLURM's view of the runs in a folder: the tasks of each, and their state."""

    def __init__(self, runs_dir: Path) -> None:
        self.logs = runs_dir / "logs"
        plans = [json.loads(path.read_text()) for path in plan_paths(runs_dir)]
        # Asked before the run folders are read: a run that ends in between is done, not lost.
        self.queue = queue() if plans else {}
        self.tasks: dict[str, list[Task]] = defaultdict(list)
        for plan in plans:
            for index, run in enumerate(plan["runs"] if plan["job"] else []):
                self.tasks[run["name"]].append((plan["job"], str(index)))

    def queued(self, name: str) -> Task | None:
        """The run's task in the queue."""
        return next((task for task in self.tasks[name] if task in self.queue), None)

    def status(self, run: Run) -> Status:
        """The run's status, from its folder and from SLURM."""
        task = self.queued(run.name)
        # A task that has left the queue may have left its lock behind, on the node it ran on.
        now = run_status(run, elsewhere=task is not None or not self.tasks[run.name])
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
        if not self.tasks[name]:
            return ""
        lines = own_lines(self.logs / f"slurm-{'_'.join(self.tasks[name][-1])}.log")
        failed = lines and not lines[-1].startswith(GOES_ON)
        return lines[-1].removeprefix("error: ") if failed else ""


def launch_array(
    runs: Sequence[Run], name: str, options: SlurmOptions, report: Sequence[str] = ()
) -> int:
    """Submit the runs that are neither finished nor queued nor running, and a report after them.

    Prints what they will take first. Failed runs are submitted only with options.retry_failed.
    report: arguments of scripts/reproduce.py; none: no report. Returns the exit status: 1 if
    failed or damaged runs are left out, else 0. Raises ConfigError if SLURM refuses.
    """
    requests(options)  # refuse impossible resources first
    runs_dir = runs[0].folder.parent
    if not options.dry_run:
        for folder in ("slurm", "logs"):
            (runs_dir / folder).mkdir(parents=True, exist_ok=True)
    with nullcontext() if options.dry_run else locked(runs_dir / "slurm" / ".lock"):
        jobs = Jobs(runs_dir)
        statuses = [(run, jobs.status(run)) for run in runs]
        due = [run for run, now in statuses if is_due(run, now, options.retry_failed)]
        failed = [run for run, now in statuses if now.state == "failed" and run not in due]
        estimate = estimator(runs, options.gpus or 1)
        say(describe(due, estimate) if due else "nothing to submit")
        if due:
            job = submit_plan(due, name, options)
            if report:
                queued = {task[0] for run in runs if (task := jobs.queued(run.name))}
                submit_report({job, *queued}, name, runs_dir / "logs", options, report)
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


def plan_paths(runs_dir: Path) -> list[Path]:
    """The plan files, oldest first."""
    return sorted((runs_dir / "slurm").glob("plan-*.json"), key=lambda path: int(path.stem[5:]))


def submit_plan(due: Sequence[Run], name: str, options: SlurmOptions) -> str:
    """Write the plan of the runs, submit its array and add the job's id to it; the id.

    Raises ConfigError in a wheel.
    """
    if not TRAIN_SCRIPT.is_file():
        raise ConfigError("SLURM jobs start from slurm/train.sbatch: git clone, and launch there")
    runs_dir = due[0].folder.parent
    former = plan_paths(runs_dir)
    plan = runs_dir / "slurm" / f"plan-{int(former[-1].stem[5:]) + 1 if former else 1}.json"
    limit = f"%{options.limit}" if options.limit else ""
    command = sbatch_command(name, runs_dir / "logs" / "slurm-%A_%a.log", options.stage)
    command += [f"--array=0-{len(due) - 1}{limit}", *requests(options), *options.sbatch]
    command += [str(TRAIN_SCRIPT), "--sweep", str(plan)]
    if options.dry_run:
        commands = [f"  [{index}] {run.command}" for index, run in enumerate(due)]
        say("\n".join([shlex.join(command), *commands]))
        return "ARRAY"
    runs = [{"name": run.name, "log": str(run.log), "arguments": run.arguments} for run in due]
    write_json(plan, {"job": None, "runs": runs})
    try:
        job = sbatch(command)
    except BaseException:
        plan.unlink()
        raise
    write_json(plan, {"job": job, "runs": runs})
    say(f"submitted array {job} of {len(due)} runs: {plan}")
    return job


def submit_report(
    jobs: Iterable[str], name: str, logs: Path, options: SlurmOptions, report: Sequence[str]
) -> None:
    """Submit the report after the arrays `jobs` have ended, well or not."""
    command = sbatch_command(f"{name}-report", logs / "slurm-report-%j.log")
    command += [f"--partition={options.partition}"] if options.partition else []
    # The report needs neither the runs' GPUs nor their time.
    command += [word for word in options.sbatch if word.startswith(FOR_REPORT)]
    command += [f"--dependency=afterany:{':'.join(sorted(jobs))}", str(REPORT_SCRIPT), *report]
    if options.dry_run:
        say(shlex.join(command))
    else:
        job = sbatch(command)
        say(f"submitted job {job}, the report after it: {logs}/slurm-report-{job}.log")


def sbatch_command(name: str, log: Path, stage: str | None = None) -> list[str]:
    """The words that both commands begin with."""
    variables = [f"PROXYNORM_ROOT={ROOT}", *([f"STAGE={stage}"] if stage else [])]
    # In sbatch's file names, % begins a substitution.
    output = f"{str(log.parent).replace('%', '%%')}/{log.name}"
    words = ["sbatch", "--parsable", f"--job-name={name}", f"--output={output}"]
    return ["env", *variables, *words]


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


def sbatch(command: Sequence[str]) -> str:
    """Run an sbatch command; the job's id. Raises ConfigError if SLURM is missing or refuses."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch not found: launcher=slurm needs SLURM; use launcher=local")
    return ask(command).strip().split(";")[0]


def queue() -> dict[Task, tuple[str, str]]:
    """State and reason of the user's queued tasks; empty where SLURM is not installed."""
    if shutil.which("squeue") is None:
        return {}
    lines = ask(["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T|%r"]).splitlines()
    rows = [line.strip().split("|", 3) for line in lines]
    return {(job, index): (state, reason) for job, index, state, reason in rows}


def ask(command: Sequence[str]) -> str:
    """The output of one of SLURM's commands. Raises ConfigError if it refuses."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"SLURM refused: {' '.join(done.stderr.split())}")
    return done.stdout
