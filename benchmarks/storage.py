"""Size against speed of .beton files, by longest side, JPEG quality and share of raw images.

  python scripts/benchmark.py storage source=DIR json=results/loader/storage.json

Bytes an image, and images a second of training crops; the files take turns, an epoch at a time.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import common, loader
from benchmarks.loader import CONTENDERS, OURS, Work, check, measure, store
from benchmarks.photographs import photographs
from proxynorm.cli import option
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores

STORED = [
    {"max_side": side, "jpeg_quality": quality, "jpeg_probability": share}
    for side, quality, share in (
        (None, 95, 1.0),
        (500, 90, 1.0),
        (500, 80, 1.0),
        (400, 90, 1.0),
        (320, 90, 1.0),
        (500, 90, 0.5),
        (400, 90, 0.1),
    )
]


@dataclass
class Options(loader.Options):
    images: int = option(1024, "how many of its images, drawn at random, or made")
    rounds: int = option(5, "epochs of each file, taken in turns")


def main(options: Options) -> None:
    check(options)
    workers = options.workers or share_of_cores()
    listing = photographs(options.source, options.images)
    table, epochs = [], {}
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        for number, way in enumerate(STORED):
            folder = Path(name) / str(number)
            samples = store(listing, folder, StorageOptions(**way), workers)
            table.append({**way, "bytes_per_image": round(float(samples.size.mean()))})
            work = Work(str(folder), options.size, options.batch, workers)
            epochs[number] = CONTENDERS[OURS](work)
        for number, speeds in measure(epochs, options.rounds).items():
            table[number]["images_per_second"] = round(median(speeds), 1)
    common.show(table)
    common.write_figures(options, {"workers": workers, "table": table})
