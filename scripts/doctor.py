"""What is installed, what is missing, how to get it.

  python scripts/doctor.py                                                   # for the default experiment
  python scripts/doctor.py experiment=imagenet_resnet50 data.root=DIR norm=bn

Takes the arguments of train.py, and checks what that run would need. One line each: ok, warning or missing, and the
command that mends it. Exit status 0, or 2 if something is missing without which the run cannot start.
"""

from __future__ import annotations

import sys

from proxynorm.cli import guard
from proxynorm.errors import ConfigError
from proxynorm.train.config import CONFIGS, compose_config, parse, settings_from


def experiment_of(arguments: list[str]) -> str | None:
    """The experiment that is named, None for the default one."""
    names = [
        override.value() for override in parse(arguments) if override.key_or_group == "experiment"
    ]
    return names[-1] if names else None


def hardware_of(experiment: str | None) -> str | None:
    """What the head of the experiment's file says it needs."""
    if experiment is None:
        return None
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("# hardware: ")), None
    )


def main() -> int:
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__.strip())
        return 0
    try:
        settings = settings_from(compose_config(arguments))
    except ConfigError as error:
        if "data.root must be given" not in str(error):
            raise
        # The rest can be checked all the same; the missing folder is a finding.
        settings = settings_from(compose_config([*arguments, "data.root=null"]))
    from proxynorm.doctor import MISSING, examine

    missing, experiment = 0, experiment_of(arguments)
    for finding in examine(settings, hardware_of(experiment), experiment):
        print(finding, flush=True)
        missing += finding.status == MISSING
    return 2 if missing else 0


if __name__ == "__main__":
    guard(main)
