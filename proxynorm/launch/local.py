"""Train runs on this machine, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from proxynorm.launch.runs import TRAIN, Run, say
from proxynorm.launch.status import IN_USE, STOPPED, last_error, run_status
from proxynorm.train.preemption import REQUEUE, StopRequest, stop_request

POLL_SECONDS = 0.2
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def run_locally(runs: Sequence[Run], jobs: int = 1, threads: int = 1) -> int:
    """Train the runs that are not finished, `jobs` at a time, each with `threads` CPU threads.

    Each run is a train.py process with a log beside the run folders, and resumes where it
    stopped. Runs that another process trains are skipped. A stop signal is passed on to the runs,
    which save and stop. Returns the exit status: 0 if all are done or running elsewhere, 75 after a
    stop signal, 1 if some failed or are damaged; these are listed with the reason.
    """
    with stop_request() as stop, ThreadPoolExecutor(jobs) as pool:
        failures = [*filter(None, pool.map(lambda run: train_if_due(run, threads, stop), runs))]
    if stop:
        say(f"stopped by {stop.received.name}; run again to go on")
        return REQUEUE
    for line in failures:
        say(f"failed: {line}")
    return 1 if failures else 0


def train_if_due(run: Run, threads: int, stop: StopRequest) -> str:
    """Train a run unless it is finished or running elsewhere.

    Returns why it failed, or that it is damaged; "" otherwise.
    """
    if stop:
        return ""
    status = run_status(run)
    skipped = {"done": "finished", "running": "running elsewhere", "damaged": "damaged"}
    say(f"{run.name}: {skipped.get(status.state, 'resuming' if status.progress else 'starting')}")
    if status.state in skipped:
        return f"{run.name}: {status.error}" if status.state == "damaged" else ""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a") as log:
        print(f"$ {run.command}", file=log, flush=True)
        start, variables = time.monotonic(), dict.fromkeys(THREADS, str(threads))
        exit_status = train(run, stop, variables, stdout=log, stderr=log)
        reason = last_error(run.log)
        if exit_status == 2 and IN_USE in reason:
            say(f"{run.name}: running elsewhere")
            return ""
        print(f"# exit status {exit_status}", file=log)
    failed = exit_status not in STOPPED
    if exit_status == -signal.SIGKILL:
        result = reason = killed(exit_status)
    elif failed:
        result = f"failed with status {exit_status}: {reason}"
    else:
        result = "stopped" if exit_status else "done"
    say(f"{run.name}: {result} ({(time.monotonic() - start) / 60:.1f} min)")
    return f"{run.name}: {reason}  ({run.log})" if failed else ""


def train(run: Run, stop: StopRequest, environment: Mapping[str, str], **streams: Any) -> int:
    """Run train.py, pass a stop signal on to it, and return its exit status.

    environment: additional variables; streams: stdout= and stderr= of Popen.
    """
    process = subprocess.Popen(
        [*TRAIN, *run.arguments],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,  # Ctrl-C reaches the run once, through this process
        **streams,
    )
    while process.poll() is None:
        if stop:
            process.send_signal(signal.SIGTERM)
            return process.wait()
        time.sleep(POLL_SECONDS)
    return process.returncode


def killed(exit_status: int) -> str:
    return f"killed (signal {-exit_status}); run again"
