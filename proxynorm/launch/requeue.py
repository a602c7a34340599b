"""Decide whether a stopped run is queued again: python -m proxynorm.launch.requeue LIMIT OVERRIDE…

Status 0: yes. Status 2, with the reason in one line: the job was queued again LIMIT times without
one weight update. The run folder holds the restart at which its step was first seen.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from proxynorm.cli import guard
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.train.config import compose_config, settings_from
from proxynorm.train.settings import folder_of


def main(arguments: Sequence[str]) -> None:
    limit, *overrides = arguments
    folder = folder_of(settings_from(compose_config(overrides)))
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "requeues.json", folder / "summary.json"
    former, summary = (json.loads(p.read_text()) if p.is_file() else {} for p in paths)
    step, restart = summary.get("steps", 0), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    first = former.get("restart", 0) if former.get("step") == step else restart
    first = min(first, restart)  # another job starts anew
    write_json(paths[0], {"step": step, "restart": first})
    if restart - first >= int(limit):
        raise ConfigError(
            f"not queued again: {folder} stays at step {step}, {limit} times queued again; "
            "give it more time"
        )


if __name__ == "__main__":
    guard(lambda: main(sys.argv[1:]))
