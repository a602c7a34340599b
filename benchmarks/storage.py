"""Size against speed of .beton files: the same photographs stored with several longest sides, JPEG qualities and shares
of raw images; bytes an image and images a second of training crops, in interleaved rounds.

  python scripts/benchmark.py storage source=DIR json=results/loader/storage.json
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.loader import photographs
from proxynorm.cli import option
from proxynorm.data import DataSpec, LoaderSpec, TrainLoader, open_data
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import Listing
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.train.run_folder import environment

# max_side, jpeg_quality, jpeg_probability
STORED = (
    (None, 95, 1.0),
    (500, 90, 1.0),
    (500, 80, 1.0),
    (400, 90, 1.0),
    (320, 90, 1.0),
    (500, 90, 0.5),
    (400, 90, 0.1),
)


@dataclass
class Options:
    source: str | None = option(
        None, "folder of class folders; left out: photographs are made, once, into the cache"
    )
    images: int = option(1024, "how many of its images, drawn at random, or made")
    size: int = option(224, "side of the crop, pixels")
    batch: int = option(64, "images a batch")
    workers: int | None = option(None, "threads; all cores if left out")
    rounds: int = option(5, "epochs of each file, taken in turns")
    json: str | None = option(None, "file for the figures, with the machine's description")


def store(listing: Listing, folder: Path, workers: int) -> list[dict]:
    """folder/NUMBER/train.beton for each way to store; returns the rows with the ways and the sizes."""
    rows = []
    for number, way in enumerate(STORED):
        options = StorageOptions(*way)
        done = prepare(listing, folder / str(number) / "train.beton", options, "raise", workers)
        samples = read_beton(done.path)
        for suffix in ("", ".json", ".sums.npy"):
            (folder / str(number) / f"val.beton{suffix}").symlink_to(f"train.beton{suffix}")
        rows.append(
            {
                "max_side": options.max_side,
                "jpeg_quality": options.jpeg_quality,
                "jpeg_probability": options.jpeg_probability,
                "bytes_per_image": round(float(samples.size.mean())),
            }
        )
    return rows


def open_loader(folder: Path, options: Options, workers: int) -> TrainLoader:
    spec = DataSpec("beton", root=str(folder), image_size=options.size, augmentation="inception")
    return open_data(spec, LoaderSpec("ffcv", workers)).train_loader(
        options.batch, options.batch, seed=0
    )


def speed(loader: TrainLoader, epoch: int) -> tuple[float, float]:
    """Images a second, and a second of processor time, of an epoch."""
    start, used = time.perf_counter(), time.process_time()
    images = sum(len(batch.images) for batch in loader.epoch(epoch))
    return images / (time.perf_counter() - start), images / (time.process_time() - used)


def show(rows: list[dict]) -> None:
    """Print the table."""
    print(
        f"{'max_side':>8}  {'quality':>7}  {'JPEG share':>10}  {'KB/image':>8}  {'images/s':>8}  {'per CPU s':>9}"
    )
    for row in rows:
        way = f"{row['max_side'] or 'any':>8}  {row['jpeg_quality']:>7}  {row['jpeg_probability']:>10}"
        speeds = f"{row['images_per_second']:>8.0f}  {row['images_per_cpu_second']:>9.0f}"
        print(f"{way}  {row['bytes_per_image'] / 1e3:>8.1f}  {speeds}")


def main(options: Options) -> int:
    if min(options.rounds, options.size, options.batch) < 1 or options.images < options.batch:
        raise ConfigError("rounds, size and batch must be at least 1, images at least batch")
    workers = share_of_cores() if options.workers is None else options.workers
    listing = photographs(options.source, options.images)
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        rows = store(listing, Path(name), workers)
        loaders = [
            open_loader(Path(name) / str(number), options, workers) for number in range(len(rows))
        ]
        # The first epoch reads the files and is not counted.
        rounds = [
            [speed(loader, epoch) for loader in loaders] for epoch in range(options.rounds + 1)
        ][1:]
    for row, speeds in zip(rows, zip(*rounds)):
        row["images_per_second"], row["images_per_cpu_second"] = (
            round(median(column), 1) for column in zip(*speeds)
        )
    show(rows)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(
            Path(options.json),
            {
                "benchmark": "storage",
                "options": {**asdict(options), "workers": workers},
                "load_average": os.getloadavg(),
                "machine": environment(),
                "table": rows,
            },
        )
    return 0
