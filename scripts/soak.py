"""Kill a training run with -9 at random moments, again and again, until it has ended; then compare it with an unbroken one.

The last line is one JSON object: kills, the steps at which they fell, what differs (nothing, if all is well: status 0).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from proxynorm.cli import option, script
from proxynorm.train.compare import differences
from proxynorm.train.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    kills: int = option(50, "how often to kill")
    runs_dir: str = option("runs/soak", "where the run folder goes")
    name: str = option("soak", "the run folder's name")
    seed: int = option(0, "of the moments")
    steps: int = option(8, "most new steps between two kills")
    seconds: float = option(0.1, "longest wait between the last of them and the kill")
    overrides: list[str] = option([], "of the run, as train.py takes them; empty: a small one")


SMALL = [
    "model.depth=8",
    "model.width=8",
    "data.limit=2000",
    "data.holdout=100",
    "batch=20",
    "epochs=4",
    "log_every=1",
    "logger=none",
    "checkpoint.every_steps=1",
    "regularization.ema_decay=0.9",
]


def steps(metrics: Path) -> int:
    """The last step that metrics.jsonl knows of."""
    rows = read_metrics(metrics)
    return rows[-1]["step"] if rows else 0


def run_and_kill(command: list[str], metrics: Path, more: int, wait: float) -> int | None:
    """Start the run, kill it `wait` seconds after `more` new steps; the step it had reached, or None if it ended first."""
    goal = steps(metrics) + more
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and steps(metrics) < goal:
        time.sleep(0.01)
    time.sleep(wait)
    if process.poll() is not None:
        if process.returncode:
            raise SystemExit(f"the run ended with status {process.returncode}")
        return None
    process.kill()
    process.wait()
    return steps(metrics)


def main(options: Options) -> int:
    generator = random.Random(options.seed)
    command = [
        sys.executable,
        "train.py",
        *(options.overrides or SMALL),
        f"runs_dir={options.runs_dir}",
        f"name={options.name}",
    ]
    metrics = ROOT / options.runs_dir / options.name / "metrics.jsonl"
    killed_at = []
    while len(killed_at) < options.kills:
        step = run_and_kill(
            command,
            metrics,
            generator.randint(1, options.steps),
            generator.uniform(0, options.seconds),
        )
        if step is None:
            break
        killed_at.append(step)
        print(f"kill {len(killed_at)} at step {step}", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    whole = f"{options.name}-whole"
    subprocess.run(
        [*command[:-1], f"name={whole}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    found = differences(ROOT / options.runs_dir / options.name, ROOT / options.runs_dir / whole)
    print(json.dumps({"kills": len(killed_at), "steps": killed_at, "differences": found}))
    return 1 if found else 0


if __name__ == "__main__":
    script(Options, main, __doc__)
