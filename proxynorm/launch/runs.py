"""A training run as launchers see it: a folder and the arguments of train.py."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from proxynorm.cli import as_installed

TRAIN = (sys.executable, "-m", "proxynorm", "train")  # also where the package is installed


def is_main() -> bool:
    """Return whether this process speaks: torchrun starts several, which all sweep."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line at once, also into a pipe, and whole, also from a thread."""
    if is_main():
        print(f"{text}\n", end="", flush=True)


class Estimate(NamedTuple):
    """Seconds of a run with its start (None: unknown) and where the number comes from."""

    seconds: float | None
    origin: str


@dataclass(frozen=True)
class Run:
    """One training run: its folder and the arguments of train.py, Hydra's quoting included."""

    folder: Path
    arguments: tuple[str, ...]
    stated: Estimate = field(
        default=Estimate(None, "nothing like it was measured"), kw_only=True
    )  # holds until runs of its kind are measured

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
        """The arguments without seed and name; runs that share them take equally long."""
        return tuple(word for word in self.arguments if not word.startswith(("seed=", "name=")))
