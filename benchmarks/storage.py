"""Size against speed of .beton files, by longest side, JPEG quality and share of raw images.

  python scripts/benchmark.py storage source=DIR json=results/loader/storage.json

Bytes an image, and images a second of training crops; the files take turns, an epoch at a time.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.contenders import Work, run_epoch
from benchmarks.loader import OURS, SOURCE, check
from benchmarks.photographs import photographs
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import Listing

STORED = (
    StorageOptions(max_side=None, jpeg_quality=95),
    StorageOptions(max_side=500, jpeg_quality=90),
    StorageOptions(max_side=500, jpeg_quality=80),
    StorageOptions(max_side=400, jpeg_quality=90),
    StorageOptions(max_side=320, jpeg_quality=90),
    StorageOptions(max_side=500, jpeg_quality=90, jpeg_probability=0.5),
    StorageOptions(max_side=400, jpeg_quality=90, jpeg_probability=0.1),
)
HEADER = ("max_side", "quality", "JPEG share", "KB/image", "images/s", "per CPU s")


@dataclass
class Options(common.Options):
    source: str | None = option(None, SOURCE)
    images: int = option(1024, "how many of its images, drawn at random, or made")
    size: int = option(224, "side of the crop, pixels")
    batch: int = option(64, "images a batch")
    workers: int | None = option(None, "threads; all cores if left out")
    rounds: int = option(5, "epochs of each file, taken in turns")


def main(options: Options) -> None:
    check(options)
    workers = options.workers or share_of_cores()
    listing = photographs(options.source, options.images)
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        folders = [Path(name) / str(number) for number in range(len(STORED))]
        table = [store(listing, *pair, workers) for pair in zip(folders, STORED)]
        works = [Work(str(folder), options.size, options.batch, workers) for folder in folders]
        # The first epoch opens and reads the files and is not counted.
        epochs = [[run_epoch(OURS, work) for work in works] for _ in range(options.rounds + 1)][1:]
    for row, runs in zip(table, zip(*epochs)):
        for key, time in (("second", "seconds"), ("cpu_second", "cpu_seconds")):
            speed = median(run["images"] / run[time] for run in runs)
            row[f"images_per_{key}"] = round(speed, 1)
    print(text_table(HEADER, [cells(*row.values()) for row in table]))
    common.write_figures(options, {"workers": workers, "table": table})


def store(listing: Listing, folder: Path, storage: StorageOptions, workers: int) -> dict:
    """Write folder/train.beton; returns the row with the way of storing and the mean size."""
    done = prepare(listing, folder / "train.beton", storage, "raise", workers)
    for suffix in ("", ".json", ".sums.npy"):
        (folder / f"val.beton{suffix}").symlink_to(f"train.beton{suffix}")
    way = {key: getattr(storage, key) for key in ("max_side", "jpeg_quality", "jpeg_probability")}
    return {**way, "bytes_per_image": round(float(read_beton(done.path).size.mean()))}


def cells(side: int | None, quality: int, share: float, size: int, *speeds: float) -> list[str]:
    """A row of the printed table."""
    way = [str(side or "any"), str(quality), str(share)]
    return [*way, f"{size / 1e3:.1f}", *(f"{speed:.0f}" for speed in speeds)]
