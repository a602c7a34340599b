"""Turn labelled images into a .beton file for FFCV, every image checked, the file verified before
it gets its name.

  python scripts/write_ffcv.py source=imagenet/train output=data/train.beton
  python scripts/write_ffcv.py source=imagenet/val output=data/val.beton labels=LOC_val_solution.csv
  python scripts/write_ffcv.py source=ILSVRC2012_img_train.tar output=data/train.beton on_bad=skip

Train on them with data=beton data.root=FOLDER, where train.beton and val.beton lie.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxynorm.cli import option, script
from proxynorm.errors import ConfigError

if TYPE_CHECKING:
    from proxynorm.data.images import StorageOptions
    from proxynorm.data.sources import Listing


@dataclass
class Options:
    source: str = option(
        "???", "folder of class folders, flat folder (with labels=), or uncompressed tar file"
    )
    output: str = option("???", "the .beton file to write")
    labels: str | None = option(
        None, "CSV of FILE,CLASS, or the folder of ImageNet's devkit, for images without class"
    )
    on_bad: str = option(
        "raise",
        "raise: stop at the first damaged image; skip: leave damaged images out and list them",
    )
    max_side: int | None = option(
        500, "shrink images whose longer side exceeds this, pixels; null: never"
    )
    jpeg_quality: int = option(90, "1..100")
    jpeg_probability: float = option(
        1.0, "share of images stored as JPEG; the others are raw: faster to read, larger"
    )
    strict: bool = option(
        True, "also refuse JPEG data that decodes with warnings (needs FFCV's library)"
    )
    workers: int | None = option(None, "processes; all cores if left out")
    overwrite: bool = option(False, "replace an existing output")


def main(options: Options) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    output = Path(options.output).expanduser()
    _check(options, output)
    from proxynorm.data.images import (
        StorageOptions,  # slow to import: only now that a signal is one line
    )
    from proxynorm.data.opening import share_of_cores
    from proxynorm.data.sources import list_source

    storage = StorageOptions(
        options.max_side, options.jpeg_quality, options.jpeg_probability, options.strict
    )
    labels = Path(options.labels).expanduser() if options.labels else None
    listing = list_source(Path(options.source).expanduser(), labels)
    _write(listing, output, storage, options.on_bad, options.workers or share_of_cores())
    return 0


def _stop(number: int, _frame: object) -> None:
    """Leave, cleaning up, when asked to by a signal; a second one would break off the cleaning."""
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.SIG_IGN)
    print(f"stopped by {signal.Signals(number).name}; nothing was written", file=sys.stderr)
    sys.exit(128 + number)


def _check(options: Options, output: Path) -> None:
    if options.on_bad not in ("raise", "skip"):
        raise ConfigError(f"on_bad={options.on_bad}: choose raise or skip")
    if output.suffix != ".beton":
        raise ConfigError(f"output={output}: give a name that ends in .beton")
    if output.exists() and not options.overwrite:
        raise ConfigError(f"output={output}: exists; give another name or overwrite=true")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"workers={options.workers}: give at least 1")


def _write(
    listing: Listing, output: Path, storage: StorageOptions, on_bad: str, workers: int
) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from proxynorm.data.ffcv.preparation import prepare

    total = len(listing.images)
    for note in listing.notes:
        print(f"warning: {note}", file=sys.stderr)
    print(
        f"{total} images, {len(listing.classes)} classes, {workers} workers -> {output}", flush=True
    )
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(
        TextColumn("checking and writing"), *columns, console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("", total=total)
        done = prepare(
            listing,
            output,
            storage,
            on_bad,
            workers,
            lambda images: bar.update(task, completed=images),
        )
    for name, reason in done.skipped.items():
        print(f"skipped {name}: {reason}")
    if done.converted:
        print(
            "converted: " + ", ".join(f"{count} {kind}" for kind, count in done.converted.items())
        )
    print(f"{done.count} images written and verified, {len(done.skipped)} skipped: {done.path}")


if __name__ == "__main__":
    script(Options, main, __doc__)
