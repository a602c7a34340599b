"""Images a second of six loaders on the same JPEGs: ours, FFCV's, torchvision's, timm's.

  python scripts/benchmark.py loader source=DIR json=results/loader/NAME.json

source is a folder of class folders; without it, images are made. Each loader has a process of its
own and as many workers; they take turns, an epoch at a time. FFCV's loaders read the .beton file
that write_ffcv.py makes of the source, the others the same JPEGs as files.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common
from benchmarks.contenders import CONTENDERS, Work, run_epoch
from benchmarks.photographs import SOURCE, photographs
from proxynorm.cli import option
from proxynorm.data.ffcv.beton import Samples
from proxynorm.data.ffcv.native import ffcv_library
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import Listing
from proxynorm.errors import ConfigError

OURS = "proxynorm ffcv"
SPEED, CPU_SPEED = "images_per_second", "images_per_cpu_second"


@dataclass
class Options(common.Options):
    source: str | None = option(None, SOURCE)
    images: int = option(2048, "how many of its images, drawn at random, or made")
    size: int = option(224, "side of the crop, pixels")
    batch: int = option(64, "images a batch")
    workers: int | None = option(None, "threads or processes of each loader; all cores if left out")
    rounds: int = option(7, "epochs of each loader, taken in turns")
    max_side: int | None = option(500, "longest side of the JPEGs, pixels; null: as it is")
    jpeg_quality: int = option(90, "their quality")


def main(options: Options) -> None:
    ffcv_library()
    check(options)
    workers = options.workers or share_of_cores()
    listing = photographs(options.source, options.images)
    storage = StorageOptions(options.max_side, options.jpeg_quality)
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        size = lay_out(listing, Path(name), storage, workers)
        print(f"{len(listing.images)} images of {size} bytes; {workers} workers", flush=True)
        figures = measure(Work(name, options.size, options.batch, workers), options.rounds)
    table = rows(figures)
    common.show(table)
    content = {"workers": workers, "images": len(listing.images), "mean_bytes": size}
    common.write_figures(options, {**content, "table": table, "figures": figures})


def check(options: Any) -> None:
    """Raise ConfigError for numbers below 1 or fewer images than a batch."""
    common.check(options)
    if options.images < options.batch:
        raise ConfigError(f"images={options.images}: give at least batch={options.batch}")


def store(listing: Listing, folder: Path, storage: StorageOptions, workers: int) -> Samples:
    """Write folder/train.beton; val.beton is the same file."""
    samples = prepare(listing, folder / "train.beton", storage, "raise", workers)
    for suffix in ("", ".json", ".sums.npy"):
        (folder / f"val.beton{suffix}").symlink_to(f"train.beton{suffix}")
    return samples


def lay_out(listing: Listing, folder: Path, storage: StorageOptions, workers: int) -> int:
    """Make folder/train.beton and, of its JPEGs, folder/train/CLASS/*, and val alike.

    Returns the mean bytes of an image.
    """
    samples = store(listing, folder, storage, workers)
    data = samples.path.read_bytes()
    for row, (start, size) in enumerate(zip(samples.pointer.tolist(), samples.size.tolist())):
        path = folder / "train" / listing.classes[listing.targets[row]] / f"{row:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[start : start + size])
    (folder / "val").symlink_to("train")
    return round(float(samples.size.mean()))


def measure(work: Work, rounds: int) -> dict[str, dict[str, Any]]:
    """Per loader: speeds of each round, and seconds to the first batch in a fresh process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(common.new_process()) for name in CONTENDERS}

        def epoch(name: str) -> dict[str, float]:
            return processes[name].submit(run_epoch, name, work).result()

        for name in CONTENDERS:
            figures[name] = {"first_batch": epoch(name)["first_batch"], SPEED: [], CPU_SPEED: []}
        for number in range(rounds):
            # Every other round backwards, so that no loader always follows the same one.
            for name in list(CONTENDERS)[:: 1 - 2 * (number % 2)]:
                found = epoch(name)
                figures[name][SPEED].append(found["images"] / found["seconds"])
                figures[name][CPU_SPEED].append(found["images"] / found["cpu_seconds"])
            print(f"round {number + 1} of {rounds}", flush=True)
    return figures


def rows(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: a row a loader."""
    table = []
    for name, found in figures.items():
        row: dict[str, Any] = {"loader": name}
        for key in (SPEED, CPU_SPEED):
            row[key] = round(median(found[key]), 1)
            row[f"ours / it, {key}"] = round(common.ratio(figures[OURS][key], found[key]), 3)
        table.append({**row, "first_batch_seconds": round(found["first_batch"], 2)})
    return table
