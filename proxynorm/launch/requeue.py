"""Whether a run that a signal has stopped may be queued again: python -m proxynorm.launch.requeue LIMIT OVERRIDE…

Status 0: yes. Status 1, and why in one line: the job was queued again LIMIT times without one weight update. The count
lies in the run folder, with the job that it belongs to, so that another job starts anew.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxynorm.errors import ProxynormError
from proxynorm.files import write_json
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import run_name

COUNT = "requeues.json"


def saved_step(folder: Path) -> int:
    """The step at which the run in `folder` last stopped, 0 if it never came to save."""
    summary = read(folder / "summary.json")
    return summary["steps"] if summary else 0


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def count_fruitless(folder: Path, job: str) -> int:
    """How often the job has stopped again at the step where it had stopped before, noted in the run folder."""
    step, former = saved_step(folder), read(folder / COUNT)
    same = former.get("job") == job and former["step"] == step
    now = {"job": job, "step": step, "fruitless": former["fruitless"] + 1 if same else 0}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COUNT, now)
    return now["fruitless"]


def main(arguments: Sequence[str]) -> int:
    limit, *overrides = arguments
    settings = settings_from(compose_config(overrides))
    folder = Path(settings.runs_dir) / run_name(settings)
    fruitless = count_fruitless(folder, os.environ["SLURM_JOB_ID"])
    if fruitless >= int(limit):
        step = saved_step(folder)
        print(
            f"error: not queued again: {folder} stays at step {step}, {limit} times queued again; give it more time"
        )
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ProxynormError as error:
        print(f"error: not queued again: {error}")
        sys.exit(1)
