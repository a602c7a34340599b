"""Runs under SLURM: submit those that are due as one array, and find the status of each.

A plan file, slurm/plan-N.json beside the run folders, lists the runs of an array: {"job": its id,
"runs": [{name, log, arguments}, …]}. Task k trains entry k. A lock file, slurm/.lock, keeps a
second launch out until the plan is written, so that no run is submitted twice.
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

from proxynorm.cli import check_fields, option
from proxynorm.errors import ConfigError
from proxynorm.files import locked, write_json
from proxynorm.launch.estimate import describe, estimator
from proxynorm.launch.runs import Run, say
from proxynorm.launch.status import Status, relevant_lines, run_status

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT, REPORT_SCRIPT = ROOT / "slurm" / "train.sbatch", ROOT / "slurm" / "report.sbatch"
# Arguments of sbatch that the report's job shares with the runs.
FOR_REPORT = ("--account=", "--partition=", "--qos=", "--reservation=")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
USUAL_REASONS = ("None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Dependency")
GPUS = "slurm: GPUs of a run on all nodes together, one process each"
GOES_ON = "# goes on in "  # slurm/train.sbatch prints it and then switches to the run's log
Task = tuple[str, str]  # the job id of an array, the index of a task in it


@dataclass
class SlurmOptions:
    """The options of `reproduce launch` and of hydra/launcher=slurm.

    None leaves a resource to the defaults of the cluster.
    """

    time: str | None = option(
        None, "slurm: time limit of a run, in sbatch's notation: 90 (minutes), 12:00:00"
    )
    partition: str | None = option(None, "slurm: partition")
    nodes: int | None = option(None, "slurm: nodes of a run", "at least 1")
    gpus: int | None = option(None, GPUS, "at least 0 and finite")
    cpus_per_task: int | None = option(None, "slurm: CPUs of a process", "at least 1")
    limit: int | None = option(None, "slurm: array tasks at a time", "at least 1")
    stage: str | None = option(
        None, "slurm: folder on each node, such as /dev/shm, to copy .beton files to first"
    )
    sbatch: list[str] = option(
        [], "slurm: further arguments of sbatch, such as sbatch=[--account=A,--mem=32G]"
    )
    retry_failed: bool = option(False, "slurm: submit failed runs again")
    dry_run: bool = option(False, "slurm: print the sbatch command and its runs, submit nothing")


class Jobs:
    """The tasks that SLURM has, or had, for the runs in a folder, and their states."""

    def __init__(self, runs_dir: Path) -> None:
        self.logs = runs_dir / "logs"
        plans = [json.loads(path.read_text()) for path in plan_paths(runs_dir)]
        # Read before the run folders, so that a run that ends in between counts as done.
        self.queue = queue() if plans else {}
        self.tasks: dict[str, list[Task]] = defaultdict(list)
        for plan in plans:
            for index, run in enumerate(plan["runs"] if plan["job"] else []):
                self.tasks[run["name"]].append((plan["job"], str(index)))

    def queued(self, name: str) -> Task | None:
        """Return the run's task in the queue."""
        return next((task for task in self.tasks[name] if task in self.queue), None)

    def status(self, run: Run) -> Status:
        """Return the run's status from its folder and the queue."""
        task = self.queued(run.name)
        # A lock file from another node is stale once the run's tasks have left the queue.
        status = run_status(run, elsewhere=task is not None or not self.tasks[run.name])
        if status.state == "done":
            return status
        if task is not None:
            state, reason = self.queue[task]
            status = replace(status, error="", job="_".join(task))
            if state not in WAITING:
                return replace(status, state="running")
            note = "" if reason in USUAL_REASONS else reason
            return replace(status, state="preempted" if status.progress else "queued", note=note)
        if status.state in ("missing", "stopped") and (error := self.failure(run.name)):
            return replace(status, state="failed", error=error)
        return status

    def failure(self, name: str) -> str:
        """Return the error that only the SLURM log of the last task shows; "" if there is none."""
        if not self.tasks[name]:
            return ""
        lines = relevant_lines(self.logs / f"slurm-{'_'.join(self.tasks[name][-1])}.log")
        failed = lines and not lines[-1].startswith(GOES_ON)
        return lines[-1].removeprefix("error: ") if failed else ""


def launch_array(
    runs: Sequence[Run], name: str, options: SlurmOptions, report: Sequence[str] = ()
) -> int:
    """Submit the runs that are neither finished nor queued nor running, and a report after them.

    Prints the estimated time first. Failed runs are submitted only with options.retry_failed.
    report: arguments of scripts/reproduce.py; none: no report. Returns the exit status: 1 if
    failed or damaged runs are left out, else 0. Raises ConfigError if SLURM refuses.
    """
    requests(options)  # reject impossible resources first
    runs_dir, *others = dict.fromkeys(run.folder.parent for run in runs)
    if others:
        raise ConfigError(
            f"the runs of an array share one runs_dir; launch {runs_dir} and {others[0]} apart"
        )
    if not options.dry_run:
        for folder in ("slurm", "logs"):
            (runs_dir / folder).mkdir(parents=True, exist_ok=True)
    with nullcontext() if options.dry_run else locked(runs_dir / "slurm" / ".lock"):
        jobs = Jobs(runs_dir)
        statuses = [(run, jobs.status(run)) for run in runs]
        due = [run for run, status in statuses if is_due(run, status, options.retry_failed)]
        failed = [run for run, status in statuses if status.state == "failed" and run not in due]
        estimate = estimator(runs, options.gpus or 1)
        say(describe(due, estimate) if due else "nothing to submit")
        if due:
            job = submit_plan(due, name, options)
            if report:
                queued = {task[0] for run in runs if (task := jobs.queued(run.name))}
                submit_report({job, *queued}, name, runs_dir / "logs", options, report)
    if failed:
        say(f"{len(failed)} failed runs are left out; retry_failed=true submits them again")
    return 1 if failed or any(status.state == "damaged" for _, status in statuses) else 0


def is_due(run: Run, status: Status, retry_failed: bool) -> bool:
    """Return whether to submit the run. If not, print why."""
    if status.state in ("missing", "stopped") or (status.state == "failed" and retry_failed):
        return True
    where = f"{status.state} as job {status.job}" if status.job else "running elsewhere"
    reasons = {"done": "finished", "failed": f"failed: {status.error}", "damaged": status.error}
    say(f"{run.name}: {reasons.get(status.state, where)}")
    return False


def plan_paths(runs_dir: Path) -> list[Path]:
    """Return the plan files, oldest first."""
    return sorted((runs_dir / "slurm").glob("plan-*.json"), key=plan_number)


def plan_number(path: Path) -> int:
    return int(path.stem.removeprefix("plan-"))


def submit_plan(due: Sequence[Run], name: str, options: SlurmOptions) -> str:
    """Submit the runs as an array, with a plan file, and return the id of its job.

    The plan is written before the array is submitted, because its tasks read it. Raises ConfigError
    outside of a checkout.
    """
    if not TRAIN_SCRIPT.is_file():
        raise ConfigError(
            "SLURM jobs need slurm/train.sbatch: git clone the repository, launch there"
        )
    runs_dir = due[0].folder.parent
    numbers = [plan_number(path) for path in plan_paths(runs_dir)]
    plan = runs_dir / "slurm" / f"plan-{max(numbers, default=0) + 1}.json"
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
    """Submit the report, to start when the arrays `jobs` have ended, whether they failed or not."""
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
    """Return the part of the command that arrays and reports share."""
    variables = [f"PROXYNORM_ROOT={ROOT}", *([f"STAGE={stage}"] if stage else [])]
    # In sbatch's file names, % begins a substitution.
    output = f"{str(log.parent).replace('%', '%%')}/{log.name}"
    words = ["sbatch", "--parsable", f"--job-name={name}", f"--output={output}"]
    return ["env", *variables, *words]


def requests(options: SlurmOptions) -> list[str]:
    """Return the arguments of sbatch for a run's resources. Raises ConfigError if impossible."""
    check_fields(options)
    nodes, gpus = options.nodes or 1, options.gpus or 0
    if gpus % nodes:
        raise ConfigError(f"gpus={gpus}: must be a multiple of nodes={nodes}")
    values = {"time": options.time, "partition": options.partition, "nodes": options.nodes}
    values |= {"gpus-per-node": gpus // nodes, "ntasks-per-node": gpus // nodes}
    values |= {"cpus-per-task": options.cpus_per_task}
    return [f"--{name}={value}" for name, value in values.items() if value]


def sbatch(command: Sequence[str]) -> str:
    """Run an sbatch command and return the job's id. Raises ConfigError if it fails."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch not found: launcher=slurm needs SLURM; use launcher=local")
    return output_of(command).strip().split(";")[0]


def queue() -> dict[Task, tuple[str, str]]:
    """Return state and reason of the user's queued tasks; none if SLURM is not installed."""
    if shutil.which("squeue") is None:
        return {}
    output = output_of(["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T|%r"])
    rows = [line.strip().split("|", 3) for line in output.splitlines()]
    return {(job, index): (state, reason) for job, index, state, reason in rows}


def output_of(command: Sequence[str]) -> str:
    """Run one of SLURM's commands and return its output. Raises ConfigError if SLURM refuses."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"SLURM refused: {' '.join(done.stderr.split())}")
    return done.stdout
