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
from proxynorm.cli import option
from proxynorm.errors import ProxynormError
from proxynorm.launch.runs import TRAIN


@dataclass
class Options(common.Options):
    overrides: list[str] = option([], "arguments of train.py; none: the default experiment")
    rounds: int = option(5, "runs, after one that is not counted", "at least 1")


def main(options: Options) -> None:
    first, *counted = (first_update(options.overrides) for _ in range(options.rounds + 1))
    row = {"first": first, "minimum": min(counted)}
    row |= {"median": median(counted), "maximum": max(counted)}
    common.show([row])
    common.write_results(options, {"seconds": row})


def first_update(overrides: list[str]) -> float:
    """Seconds until metrics.jsonl has its first row. Raises ProxynormError if the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["max_steps=1", "log_every=1", f"runs_dir={folder}", "name=start"]
        start = time.perf_counter()
        process = subprocess.Popen([*TRAIN, *overrides, *fixed], stdout=subprocess.DEVNULL)
        while not Path(folder, "start", "metrics.jsonl").exists():
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
