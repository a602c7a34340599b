"""Check what is installed and what an experiment needs.

  python scripts/doctor.py     # default experiment
  python scripts/doctor.py experiment=imagenet_resnet50 data.root=DIR norm=bn

Takes the arguments of train.py and checks what that run would need.
Each line says ok, warning or missing, and how to fix it. Exit status 2 if
something is missing without which the run cannot start, else 0.
"""

from __future__ import annotations

import re
import sys

from proxynorm.cli import as_installed, guard
from proxynorm.errors import ConfigError
from proxynorm.train.config import CONFIGS, compose_config, parse, settings_from


def hardware_of(experiment: str) -> str | None:
    """The hardware that the head of one of our experiments' files asks for."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    found = re.search(r"^# hardware: (.*)", path.read_text(), re.M) if path.is_file() else None
    return found and found[1]


def main() -> int:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(as_installed(__doc__.strip()))
        return 0
    try:
        settings = settings_from(compose_config(arguments))
    except ConfigError as error:
        if "data.root must be given" not in str(error):
            raise
        # The rest can be checked all the same; the missing folder becomes a finding.
        settings = settings_from(compose_config([*arguments, "data.root=null"]))
    from proxynorm.doctor import MISSING, examine

    named = [item.value() for item in parse(arguments) if item.key_or_group == "experiment"]
    experiment = named[-1] if named else None
    missing = False
    for finding in examine(settings, experiment and hardware_of(experiment), experiment):
        print(as_installed(str(finding)), flush=True)
        missing |= finding.status == MISSING
    return 2 if missing else 0


def entry() -> None:
    guard(main)
