"""Size against speed of .beton files, by longest side, JPEG quality and share of raw images.

  python scripts/benchmark.py storage source=DIR json=results/loader/storage.json

Bytes an image, and images a second of training crops; the files take turns, an epoch at a time.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.loader import SOURCE
from benchmarks.photographs import photographs
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.data import DataSpec, LoaderSpec, TrainLoader, open_data
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import Listing
from proxynorm.errors import ConfigError

STORED = (
    StorageOptions(None, 95, 1.0),
    StorageOptions(500, 90, 1.0),
    StorageOptions(500, 80, 1.0),
    StorageOptions(400, 90, 1.0),
    StorageOptions(320, 90, 1.0),
    StorageOptions(500, 90, 0.5),
    StorageOptions(400, 90, 0.1),
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
    common.require_positive(options, "rounds", "size", "batch", "workers")
    if options.images < options.batch:
        raise ConfigError(f"images={options.images}: give at least batch={options.batch}")
    workers = options.workers or share_of_cores()
    listing = photographs(options.source, options.images)
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        folders = [Path(name) / str(number) for number in range(len(STORED))]
        table = [store(listing, *pair, workers) for pair in zip(folders, STORED)]
        loaders = [open_loader(folder, options, workers) for folder in folders]
        # The first epoch reads the files and is not counted.
        epochs = range(options.rounds + 1)
        rounds = [[speed(loader, epoch) for loader in loaders] for epoch in epochs][1:]
    for row, speeds in zip(table, zip(*rounds)):
        wall, cpu = (round(median(column), 1) for column in zip(*speeds))
        row |= {"images_per_second": wall, "images_per_cpu_second": cpu}
    print(text_table(HEADER, [cells(row) for row in table]))
    common.write_figures(options, {"workers": workers, "table": table})


def store(listing: Listing, folder: Path, storage: StorageOptions, workers: int) -> dict:
    """Write folder/train.beton; returns the row with the way of storing and the mean size."""
    done = prepare(listing, folder / "train.beton", storage, "raise", workers)
    for suffix in ("", ".json", ".sums.npy"):
        (folder / f"val.beton{suffix}").symlink_to(f"train.beton{suffix}")
    size = round(float(read_beton(done.path).size.mean()))
    return {**asdict(storage), "bytes_per_image": size}


def open_loader(folder: Path, options: Options, workers: int) -> TrainLoader:
    spec = DataSpec("beton", root=str(folder), image_size=options.size, augmentation="inception")
    data = open_data(spec, LoaderSpec("ffcv", workers))
    return data.train_loader(options.batch, options.batch, seed=0)


def speed(loader: TrainLoader, epoch: int) -> tuple[float, float]:
    """Images a second, and a second of processor time, of an epoch."""
    start, used = time.perf_counter(), time.process_time()
    images = sum(len(batch.images) for batch in loader.epoch(epoch))
    return images / (time.perf_counter() - start), images / (time.process_time() - used)


def cells(row: dict) -> list[str]:
    """A row of the printed table."""
    way = [row["max_side"] or "any", row["jpeg_quality"], row["jpeg_probability"]]
    speeds = [f"{row[key]:.0f}" for key in ("images_per_second", "images_per_cpu_second")]
    return [*map(str, way), f"{row['bytes_per_image'] / 1e3:.1f}", *speeds]
