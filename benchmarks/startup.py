"""Seconds from `python train.py` to its first weight update, in a process of its own, with a warm cache.

python scripts/benchmark.py startup rounds=5 json=FILE
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.errors import ProxynormError
from proxynorm.files import write_json
from proxynorm.train.config import CONFIGS
from proxynorm.train.run_folder import environment


@dataclass
class Options:
    overrides: list[str] = option(
        [], "of the run, as train.py takes them; empty: the default experiment"
    )
    rounds: int = option(5, "runs, after one that is not counted")
    json: str | None = option(None, "file for the figures, with the machine's description")


def first_update(overrides: list[str], folder: Path) -> float:
    """Seconds until metrics.jsonl has its first row. Raises ProxynormError if the run fails."""
    command = [
        sys.executable,
        "train.py",
        *overrides,
        "max_steps=1",
        "log_every=1",
        f"runs_dir={folder}",
        "name=start",
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=CONFIGS.parent, stdout=subprocess.DEVNULL)
    metrics = folder / "start" / "metrics.jsonl"
    while not metrics.exists():
        if process.poll() is not None:
            raise ProxynormError(
                f"the run ended with status {process.returncode} before its first weight update"
            )
        time.sleep(0.005)
    elapsed = time.perf_counter() - start
    process.kill()
    process.wait()
    return elapsed


def main(options: Options) -> int:
    seconds = []
    for _ in range(options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(first_update(options.overrides, Path(folder)))
    counted = seconds[1:]
    row = {
        "first": seconds[0],
        "minimum": min(counted),
        "median": median(counted),
        "maximum": max(counted),
    }
    print(text_table(tuple(row), [[f"{value:.1f} s" for value in row.values()]]))
    if options.json:
        write_json(
            Path(options.json),
            {"options": vars(options), "environment": environment(), "seconds": row},
        )
    return 0
