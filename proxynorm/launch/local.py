"""Train runs on this machine, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from proxynorm.errors import ConfigError
from proxynorm.launch.runs import TRAIN, Run, say
from proxynorm.launch.status import IN_USE, STOPPED, last_error, run_status
from proxynorm.train.preemption import REQUEUE, stop_request

POLL_SECONDS = 0.2
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Worker:
    """A run that is being trained."""

    run: Run
    process: subprocess.Popen
    started: float


def run_locally(runs: Sequence[Run], jobs: int = 1, threads: int = 1) -> int:
    """Train the runs that are not finished, `jobs` at a time, each with `threads` CPU threads.

    Each run is a train.py process with a log beside the run folders, and resumes where it
    stopped. Runs that another process trains are skipped. A stop signal is passed on to the runs,
    which save. Returns the exit status: 0 all done or running elsewhere, 75 stopped by a signal,
    1 some failed or are damaged, which are listed with the reason.
    """
    if jobs < 1 or threads < 1:
        raise ConfigError(f"jobs={jobs}, threads={threads}: must be at least 1")
    pending, workers, failures = list(runs), [], []
    with stop_request() as stop:
        while workers or (pending and not stop):
            while pending and len(workers) < jobs and not stop:
                workers += start_if_due(pending.pop(0), threads, failures)
            ended = [worker for worker in workers if worker.process.poll() is not None]
            workers = [worker for worker in workers if worker not in ended]
            failures += filter(None, map(finish, ended))
            if stop:
                for worker in workers:
                    worker.process.send_signal(signal.SIGTERM)
                for worker in workers:
                    worker.process.wait()
            elif not ended:
                time.sleep(POLL_SECONDS)
        if stop:
            say(f"stopped by {stop.received.name}; run again to go on")
            return REQUEUE
    for line in failures:
        say(f"failed: {line}")
    return 1 if failures else 0


def start_if_due(run: Run, threads: int, failures: list[str]) -> list[Worker]:
    """Start the run unless it is finished or running elsewhere; a damaged one is a failure."""
    now = run_status(run)
    left = {"done": "finished", "running": "running elsewhere", "damaged": "damaged"}
    if now.state == "damaged":
        failures.append(f"{run.name}: {now.error}")
    say(f"{run.name}: {left.get(now.state, 'resuming' if now.progress else 'starting')}")
    return [] if now.state in left else [start(run, threads)]


def start(run: Run, threads: int) -> Worker:
    """Start train.py for the run, its output appended to the log."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a") as log:
        print(f"$ {run.command}", file=log, flush=True)
        process = subprocess.Popen(
            [*TRAIN, *run.arguments],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(THREADS, str(threads))},
            start_new_session=True,  # Ctrl-C reaches the run once, through run_locally
        )
    return Worker(run, process, time.monotonic())


def finish(worker: Worker) -> str:
    """Print how the run ended, into its log too. Returns the failure, "" if it is none."""
    run, status = worker.run, worker.process.returncode
    reason = last_error(run.log)
    if status == 2 and IN_USE in reason:
        say(f"{run.name}: running elsewhere")
        return ""
    with open(run.log, "a") as log:
        print(f"# exit status {status}", file=log)
    failed = status not in (0, *STOPPED)
    if status == -signal.SIGKILL:
        words = reason = f"killed (signal {-status}); run again"
    elif failed:
        words = f"failed with status {status}: {reason}"
    else:
        words = "stopped" if status else "done"
    say(f"{run.name}: {words} ({(time.monotonic() - worker.started) / 60:.1f} min)")
    return f"{run.name}: {reason}  ({run.log})" if failed else ""
