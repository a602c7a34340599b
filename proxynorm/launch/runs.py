"""A training run as launchers see it: a folder and the arguments of train.py."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from proxynorm.cli import as_installed

TRAIN = (sys.executable, "-m", "proxynorm", "train")  # works without a checkout, too


def is_main() -> bool:
    """Return whether this is the main process. Under torchrun, every process runs the sweep."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print text from the main process, flushed, in a single write so threads do not mix lines."""
    if is_main():
        print(f"{text}\n", end="", flush=True)


class Estimate(NamedTuple):
    """Seconds that a run takes, start-up included (None: unknown), and their origin in words."""

    seconds: float | None
    origin: str


@dataclass(frozen=True)
class Run:
    """A training run.

    arguments: of train.py, with Hydra's quoting
    stated:    the estimate to use until runs of the same kind are measured
    """

    folder: Path
    arguments: tuple[str, ...]
    stated: Estimate = field(default=Estimate(None, "nothing like it was measured"), kw_only=True)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        """The file with the run's output and exit status."""
        return self.folder.parent / "logs" / f"{self.name}.log"

    @property
    def command(self) -> str:
        """The command line as typed in a shell."""
        return f"{as_installed('python train.py')} {shlex.join(self.arguments)}"

    @property
    def kind(self) -> tuple[str, ...]:
        """The arguments without seed and name. Runs of the same kind take equally long."""
        return tuple(word for word in self.arguments if not word.startswith(("seed=", "name=")))
