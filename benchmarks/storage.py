"""Size and speed of .beton files, by longest side, JPEG quality and share of raw images.

  python scripts/benchmark.py storage source=DIR json=results/loader/storage.json

Prints bytes per image and images per second of training crops. The files take turns, one epoch
at a time.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks import common, loader
from benchmarks.loader import COUNT, check, measure, ours, write_beton
from benchmarks.photographs import photographs
from proxynorm.cli import option
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores

# Longest side, JPEG quality, share of JPEG.
STORED = (
    StorageOptions(None, 95, 1.0),
    StorageOptions(500, 90, 1.0),
    StorageOptions(500, 80, 1.0),
    StorageOptions(400, 90, 1.0),
    StorageOptions(320, 90, 1.0),
    StorageOptions(500, 90, 0.5),
    StorageOptions(400, 90, 0.1),
)


@dataclass
class Options(loader.Options):
    images: int = option(1024, COUNT, "at least 1")
    rounds: int = option(5, "epochs of each file, interleaved", "at least 1")


def main(options: Options) -> None:
    check(options)
    options.workers = options.workers or share_of_cores()
    listing = photographs(options.source, options.images)
    table, epochs = [], {}
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        for number, storage in enumerate(STORED):
            folder = Path(name) / str(number)
            samples = write_beton(listing, folder, storage, options.workers)
            table.append({**asdict(storage), "bytes_per_image": round(float(samples.size.mean()))})
            epochs[number] = ours(folder, options, "ffcv")
        for number, speeds in measure(epochs, options.rounds).items():
            table[number]["images_per_second"] = round(median(speeds), 1)
    common.show(table)
    common.write_results(options, {"workers": options.workers, "table": table})
