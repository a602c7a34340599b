"""Decide whether a stopped run is queued again: python -m proxynorm.launch.requeue LIMIT OVERRIDE…

Status 0: yes. Status 1, with the reason in one line: the job was queued again LIMIT times without
one weight update. The count lies in the run folder with the job's id; another job starts anew.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from proxynorm.errors import ProxynormError
from proxynorm.files import write_json
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import folder_of


def main(arguments: Sequence[str]) -> int:
    limit, *overrides = arguments
    settings = settings_from(compose_config(overrides))
    folder = folder_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    paths, job = [folder / "requeues.json", folder / "summary.json"], os.environ["SLURM_JOB_ID"]
    former, summary = (json.loads(p.read_text()) if p.is_file() else {} for p in paths)
    step = summary.get("steps", 0)
    same = (former.get("job"), former.get("step")) == (job, step)
    fruitless = former["fruitless"] + 1 if same else 0
    write_json(folder / "requeues.json", {"job": job, "step": step, "fruitless": fruitless})
    if fruitless < int(limit):
        return 0
    print(
        f"error: not queued again: {folder} stays at step {step}, {limit} times queued again; "
        "give it more time"
    )
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ProxynormError as error:
        print(f"error: not queued again: {error}")
        sys.exit(1)
