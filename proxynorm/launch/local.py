"""The launchers: run what a table lacks on this machine, k runs at a time, or hand it to SLURM."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from proxynorm.errors import ConfigError
from proxynorm.launch.runs import IN_USE, STOPPED, TRAIN, Run, last_error, standing
from proxynorm.launch.slurm import SlurmOptions
from proxynorm.launch.sweep import Entry, run_on_slurm
from proxynorm.train.preemption import REQUEUE, stop_request

POLL_SECONDS = 0.2
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


@dataclass(frozen=True)
class LaunchOptions:
    """jobs: runs at a time; threads: of each run; overrides: further ones for every run; say: prints a line; slurm: what
    sbatch is asked for; check: gets the runs about to be submitted to SLURM, and raises ConfigError to refuse."""

    jobs: int = 1
    threads: int = 1
    overrides: tuple[str, ...] = ()
    say: Callable[[str], None] = partial(print, flush=True)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    check: Callable[[Sequence[Entry]], None] | None = None


@dataclass
class Child:
    """A run that is being trained."""

    run: Run
    process: subprocess.Popen
    started: float
    told: bool = False


def run_locally(runs: Sequence[Run], options: LaunchOptions) -> int:
    """Train the runs that are not finished, `jobs` at a time, skipping those that another process trains.

    Each run is a train.py process with a log beside the run folders, and goes on where it stopped. A stop signal is
    passed on to the runs, which save. Returns the exit status: 0 all done or running elsewhere, 75 stopped by a signal,
    1 some failed or are damaged (listed with their last error line, or with what is damaged).
    """
    if options.jobs < 1 or options.threads < 1:
        raise ConfigError(f"jobs={options.jobs}, threads={options.threads}: must be at least 1")
    pending, children, failed = list(runs), [], []  # failed: a line for each
    with stop_request() as stop:
        while children or (pending and not stop):
            while pending and len(children) < options.jobs and not stop:
                children += start_if_due(pending.pop(0), options, failed)
            ended = [child for child in children if child.process.poll() is not None]
            children = [child for child in children if child not in ended]
            for child in ended:
                settle(child, options.say, failed)
            if stop:
                pass_on(children)
            if not ended:
                time.sleep(POLL_SECONDS)
        if stop:
            options.say(f"stopped by {stop.received.name}; run again to go on")
            return REQUEUE
    for line in failed:
        options.say(f"failed: {line}")
    return 1 if failed else 0


def start_if_due(run: Run, options: LaunchOptions, failed: list[str]) -> list[Child]:
    """The started run, or nothing if it is finished or being trained elsewhere, or damaged, which is added to `failed`."""
    now = standing(run)
    state = now.state
    if state == "damaged":
        failed.append(f"{run.name}: {now.error}")
        options.say(f"{run.name}: damaged")
        return []
    if state in ("done", "running"):
        options.say(f"{run.name}: {'finished' if state == 'done' else 'running elsewhere'}")
        return []
    options.say(f"{run.name}: {'going on' if state == 'stopped' else 'starting'}")
    return [start(run, options)]


def start(run: Run, options: LaunchOptions) -> Child:
    """Start train.py for the run, its output appended to the log."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [*run.arguments(), *options.overrides]
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(options.threads))}
    with open(run.log, "a") as log:
        print("$ " + shlex.join(["python", "train.py", *arguments]), file=log, flush=True)
        # a session of its own: an interrupt from the keyboard reaches the run once, through pass_on
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *arguments],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    return Child(run, process, time.monotonic())


def settle(child: Child, say: Callable[[str], None], failed: list[str]) -> None:
    """Note the exit status in the log and say how the run ended; a failure is added to `failed`."""
    run, status = child.run, child.process.returncode
    minutes = (time.monotonic() - child.started) / 60
    if status == 2 and IN_USE in last_error(run.log):
        say(f"{run.name}: running elsewhere")
        return
    with open(run.log, "a") as log:
        print(f"# exit status {status}", file=log)
    ended_well = status == 0 or status in STOPPED
    killed = status == -signal.SIGKILL
    why = f"killed (signal {-status}); run again" if killed else last_error(run.log)
    failure = why if killed else f"failed with status {status}: {why}"
    say(
        f"{run.name}: {failure if not ended_well else 'stopped' if status else 'done'} ({minutes:.1f} min)"
    )
    if not ended_well:
        failed.append(f"{run.name}: {why}  ({run.log})")


def pass_on(children: Sequence[Child]) -> None:
    """Send the stop signal, once, to the runs; they save and end with status 75."""
    for child in children:
        if not child.told:
            child.told = True
            child.process.send_signal(signal.SIGTERM)


# A launcher takes the table's runs and LaunchOptions and returns the exit status.
LAUNCHERS: dict[str, Callable[[Sequence[Run], LaunchOptions], int]] = {
    "local": run_locally,
    "slurm": run_on_slurm,
}
