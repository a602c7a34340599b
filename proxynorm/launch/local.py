"""Train runs on this machine, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from proxynorm.errors import ConfigError
from proxynorm.launch.runs import TRAIN, Run, say
from proxynorm.launch.status import IN_USE, STOPPED, last_error, run_status
from proxynorm.train.preemption import REQUEUE, StopRequest, stop_request

POLL_SECONDS = 0.2
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def run_locally(runs: Sequence[Run], jobs: int = 1, threads: int = 1) -> int:
    """Train the runs that are not finished, `jobs` at a time, each with `threads` CPU threads.

    Each run is a train.py process with a log beside the run folders, and resumes where it
    stopped. Runs that another process trains are skipped. A stop signal is passed on to the runs,
    which save. Returns the exit status: 0 all done or running elsewhere, 75 stopped by a signal,
    1 some failed or are damaged, which are listed with the reason.
    """
    if jobs < 1 or threads < 1:
        raise ConfigError(f"jobs={jobs}, threads={threads}: must be at least 1")
    with stop_request() as stop, ThreadPoolExecutor(jobs) as pool:
        failures = [*filter(None, pool.map(lambda run: train_if_due(run, threads, stop), runs))]
    if stop:
        say(f"stopped by {stop.received.name}; run again to go on")
        return REQUEUE
    for line in failures:
        say(f"failed: {line}")
    return 1 if failures else 0


def train_if_due(run: Run, threads: int, stop: StopRequest) -> str:
    """Train a run unless it is finished or running elsewhere; its failure, "" if there is none."""
    if stop:
        return ""
    now = run_status(run)
    left = {"done": "finished", "running": "running elsewhere", "damaged": "damaged"}
    say(f"{run.name}: {left.get(now.state, 'resuming' if now.progress else 'starting')}")
    if now.state in left:
        return f"{run.name}: {now.error}" if now.state == "damaged" else ""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a") as log:
        print(f"$ {run.command}", file=log, flush=True)
        begun, limits = time.monotonic(), dict.fromkeys(THREADS, str(threads))
        status = train(run, stop, limits, stdout=log, stderr=log)
        reason = last_error(run.log)
        if status == 2 and IN_USE in reason:
            say(f"{run.name}: running elsewhere")
            return ""
        print(f"# exit status {status}", file=log)
    failed = status not in STOPPED
    if status == -signal.SIGKILL:
        words = reason = killed(status)
    elif failed:
        words = f"failed with status {status}: {reason}"
    else:
        words = "stopped" if status else "done"
    say(f"{run.name}: {words} ({(time.monotonic() - begun) / 60:.1f} min)")
    return f"{run.name}: {reason}  ({run.log})" if failed else ""


def train(run: Run, stop: StopRequest, environment: Mapping[str, str], **streams: Any) -> int:
    """Run train.py, passing a stop signal on to it; the exit status.

    environment: further variables; streams: stdout=, stderr= of Popen.
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


def killed(status: int) -> str:
    return f"killed (signal {-status}); run again"
