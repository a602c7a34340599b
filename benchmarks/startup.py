"""Seconds from `python train.py` to the first weight update, with a warm cache.

python scripts/benchmark.py startup rounds=5 json=FILE
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import common
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.errors import ProxynormError
from proxynorm.launch.runs import TRAIN


@dataclass
class Options(common.Options):
    overrides: list[str] = option([], "arguments of train.py; empty: the default experiment")
    rounds: int = option(5, "runs, after one that is not counted")


def first_update(overrides: list[str], folder: Path) -> float:
    """Seconds until metrics.jsonl has its first row. Raises ProxynormError if the run fails."""
    fixed = ["max_steps=1", "log_every=1", f"runs_dir={folder}", "name=start"]
    command = [*TRAIN, *overrides, *fixed]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (folder / "start" / "metrics.jsonl").exists():
        if process.poll() is not None:
            raise ProxynormError(
                f"the run ended with status {process.returncode} before its first weight update"
            )
        time.sleep(0.005)
    elapsed = time.perf_counter() - start
    # The run would go on to save and evaluate, which is not start-up.
    process.kill()
    process.wait()
    return elapsed


def main(options: Options) -> None:
    common.require_positive(options, "rounds")
    times = []
    for _ in range(options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            times.append(first_update(options.overrides, Path(folder)))
    first, *counted = times
    row = {"first": first, "minimum": min(counted)}
    row |= {"median": median(counted), "maximum": max(counted)}
    print(text_table(tuple(row), [[f"{value:.1f} s" for value in row.values()]]))
    common.write_figures(options, {"seconds": row})
