"""Render the README's measured blocks from results/ anew; check=true only tells whether they are up to date."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from proxynorm.cli import option, script
from proxynorm.errors import DataError
from proxynorm.files import write_text
from proxynorm.paper.readme import render, stale

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    check: bool = option(False, "change nothing; status 2 if a block differs from results/")


def main(options: Options) -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    if not options.check:
        write_text(path, render(text, ROOT / "results"))
    elif names := stale(text, ROOT / "results"):
        raise DataError(
            f"{path}: {', '.join(names)} differ from results/; python scripts/readme.py renders them anew"
        )
    return 0


if __name__ == "__main__":
    script(Options, main, __doc__)
