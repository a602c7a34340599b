"""Write labelled images to a .beton file for FFCV. Every image is checked, and the file verified.

  python scripts/write_ffcv.py source=imagenet/train output=data/train.beton
  python scripts/write_ffcv.py source=imagenet/val output=data/val.beton labels=LOC_val_solution.csv
  python scripts/write_ffcv.py source=ILSVRC2012_img_train.tar output=data/train.beton on_bad=skip

Train on them with data=beton data.root=FOLDER, the folder of train.beton and val.beton.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxynorm.cli import option
from proxynorm.errors import ConfigError

if TYPE_CHECKING:
    from proxynorm.data.ffcv.beton import Samples
    from proxynorm.data.images import StorageOptions
    from proxynorm.data.sources import Listing

SOURCE = "folder of class folders, flat folder (with labels=), or uncompressed tar file"
LABELS = "for images without class folders: CSV of FILE,CLASS, or the folder of ImageNet's devkit"
ON_BAD = "raise: stop at the first damaged image; skip: leave damaged images out and list them"
MAX_SIDE = "shrink images whose longer side exceeds this, pixels; null: never"
RAW = "share of images stored as JPEG; the others are raw: faster to read, larger"


@dataclass
class Options:
    source: str = option("???", SOURCE)
    output: str = option("???", "the .beton file to write")
    labels: str | None = option(None, LABELS)
    on_bad: str = option("raise", ON_BAD, choices=("raise", "skip"))
    max_side: int | None = option(500, MAX_SIDE)
    jpeg_quality: int = option(90, "1..100")
    jpeg_probability: float = option(1.0, RAW)
    workers: int | None = option(None, "threads; all cores if left out", "at least 1")
    overwrite: bool = option(False, "replace an existing output")


def main(options: Options) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    # Imported only now: the imports take a second, during which a signal may arrive.
    from proxynorm.data.images import StorageOptions
    from proxynorm.data.opening import share_of_cores
    from proxynorm.data.sources import list_source

    output = Path(options.output).expanduser()
    if output.suffix != ".beton":
        raise ConfigError(f"output={output}: give a name that ends in .beton")
    if output.exists() and not options.overwrite:
        raise ConfigError(f"output={output}: exists; give another name or overwrite=true")
    storage = StorageOptions(options.max_side, options.jpeg_quality, options.jpeg_probability)
    labels = Path(options.labels).expanduser() if options.labels else None
    listing = list_source(Path(options.source).expanduser(), labels)
    for note in listing.notes:
        print(f"warning: {note}", file=sys.stderr)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    workers = options.workers or share_of_cores()
    content = f"{len(listing.images)} images, {len(listing.classes)} classes"
    print(f"{content}, {workers} workers -> {output}", flush=True)
    samples = _write(listing, output, storage, options.on_bad, workers)
    for note in samples.empty_class_notes(output):
        print(f"warning: {note}", file=sys.stderr)
    skipped = samples.manifest["skipped"]
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"{len(samples)} images written and verified, {len(skipped)} skipped: {output}")
    return 0


def _stop(number: int, _frame: object) -> None:
    """Exit after a signal. A second one is ignored, so the clean-up is not interrupted."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    print(f"stopped by {signal.Signals(number).name}; nothing was written", file=sys.stderr)
    sys.exit(128 + number)


def _write(
    listing: Listing, output: Path, storage: StorageOptions, on_bad: str, workers: int
) -> Samples:
    """Write the file, with a progress bar."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from proxynorm.data.ffcv.writer import prepare

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("checking and writing", total=len(listing.images))
        return prepare(
            listing, output, storage, on_bad, workers, lambda done: bar.update(task, completed=done)
        )
