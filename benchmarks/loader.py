"""Compare loaders on the same JPEGs, same crop, same number of workers: this package's two, FFCV's own, torchvision's
DataLoader, timm's create_loader; each in a process of its own, in interleaved rounds of one epoch each.

  python scripts/benchmark.py loader source=DIR json=results/loader/NAME.json

source is a folder of class folders; without it, photographs are made from Debian's tuxpaint-stamps-default. The FFCV
loaders read the .beton file that write_ffcv.py makes of it, the others the source's own files or, with
same_bytes=true, the JPEGs of the .beton file.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.children import Child
from benchmarks.contenders import CONTENDERS, Work, command
from benchmarks.photographs import make_photographs
from proxynorm.cli import option
from proxynorm.data.cache import cache_folder
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.ffcv.native import ffcv_library, map_file
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores
from proxynorm.data.randomness import permutation
from proxynorm.data.sources import Listing, list_folder
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.train.run_folder import environment

OURS, FREE, BARE, TORCHVISION, TIMM = (
    "proxynorm ffcv",
    "proxynorm ffcv, not deterministic",
    "ffcv.Loader",
    "torchvision DataLoader",
    "timm create_loader",
)
FIRST_BATCH_SECONDS, DETERMINISTIC_PRICE = 5.0, 0.03
LEAST_RATIO = {BARE: 0.97, TORCHVISION: 2.0, TIMM: 2.5}


@dataclass
class Options:
    source: str | None = option(
        None, "folder of class folders; left out: photographs are made, once, into the cache"
    )
    images: int = option(2048, "how many of its images, drawn at random, or made")
    size: int = option(224, "side of the crop, pixels")
    batch: int = option(64, "images a batch")
    workers: int | None = option(None, "threads or processes of each loader; all cores if left out")
    rounds: int = option(7, "epochs of each loader, taken in turns")
    max_side: int | None = option(500, "longest side in the .beton file, pixels; null: as it is")
    jpeg_quality: int = option(90, "JPEG quality in the .beton file")
    same_bytes: bool = option(
        False, "let torchvision and timm read the .beton file's JPEGs, not the source's"
    )
    json: str | None = option(None, "file for the figures, with the machine's description")


def photographs(source: str | None, images: int) -> Listing:
    """`images` images of a folder of class folders, drawn at random, or as many made."""
    listing = list_folder(
        Path(source)
        if source
        else make_photographs(cache_folder(None) / "benchmark-photographs", images)
    )
    if source is None and len(listing.images) < images:
        raise ConfigError(f"images={images}: must be above 0")
    rows = np.sort(permutation(0, 0, len(listing.images))[:images])
    return Listing(listing.classes, [listing.images[row] for row in rows], listing.targets[rows])


def lay_out(
    listing: Listing, folder: Path, storage: StorageOptions, workers: int, same_bytes: bool
) -> dict[str, int]:
    """folder/train.beton and folder/train/CLASS/*; val is the same. Returns the mean sizes of their images, bytes."""
    beton = prepare(listing, folder / "train.beton", storage, "raise", workers).path
    samples, data = read_beton(beton), map_file(beton)
    for row, image in enumerate(listing.images):
        source = Path(image.path).resolve()
        path = (
            folder / "train" / listing.classes[listing.targets[row]] / f"{row:07d}{source.suffix}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        if same_bytes:
            path.with_suffix(".jpg").write_bytes(
                data[samples.pointer[row] : samples.pointer[row] + samples.size[row]]
            )
        else:
            path.symlink_to(source)
    for name in ("", ".beton", ".beton.json", ".beton.sums.npy"):
        (folder / f"val{name}").symlink_to(f"train{name}")
    files = (
        samples.size if same_bytes else [os.stat(image.path).st_size for image in listing.images]
    )
    return {"beton": round(float(samples.size.mean())), "folder": round(float(np.mean(files)))}


def measure(work: Work, rounds: int, folder: Path) -> dict[str, dict]:
    """Per contender: "images_per_second" and "images_per_cpu_second" of each round, "first_batch" seconds of a first
    and a second process, "memory" bytes."""
    figures = {name: {"images_per_second": [], "images_per_cpu_second": []} for name in CONTENDERS}
    children = {}
    with ExitStack() as stack:
        for number, name in enumerate(CONTENDERS):
            # An empty cache for what numba compiles, so that the first process is the first one.
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "NUMBA_CACHE_DIR": str(folder / f"numba{number}"),
            }
            errors = folder / "errors.txt"
            with Child(command(name, work), environment, errors) as child:
                first = child.ask()["first_batch"]
            children[name] = stack.enter_context(Child(command(name, work), environment, errors))
            second = children[name].ask()["first_batch"]
            # In an epoch of its own: looking at a process slows it.
            figures[name] |= {
                "first_batch": [first, second],
                "memory": children[name].ask_with_memory()["memory"],
            }
            print(
                f"{name}: first batch after {first:.1f} s, in a second process {second:.1f} s",
                flush=True,
            )
        for number in range(rounds):
            # Every other round backwards, so that no contender always follows the same one.
            for name in list(CONTENDERS)[:: 1 - 2 * (number % 2)]:
                answer = children[name].ask()
                figures[name]["images_per_second"].append(answer["images"] / answer["seconds"])
                figures[name]["images_per_cpu_second"].append(
                    answer["images"] / answer["cpu_seconds"]
                )
            print(f"round {number + 1} of {rounds}", flush=True)
    return figures


def ratio(
    figures: dict[str, dict], name: str, other: str, speed: str = "images_per_second"
) -> float:
    """Median over the rounds of name's speed over the other's, in the same round."""
    pairs = zip(figures[name][speed], figures[other][speed])
    return median(a / b for a, b in pairs)


def rows(figures: dict[str, dict]) -> list[dict]:
    """The table: one row per contender."""
    return [
        {
            "loader": name,
            "images_per_second": round(median(found["images_per_second"]), 1),
            "ours_over_it": round(ratio(figures, OURS, name), 3),
            "images_per_cpu_second": round(median(found["images_per_cpu_second"]), 1),
            "ours_over_it_per_cpu_second": round(
                ratio(figures, OURS, name, "images_per_cpu_second"), 3
            ),
            "first_batch_seconds": round(found["first_batch"][0], 2),
            "first_batch_seconds_second_run": round(found["first_batch"][1], 2),
            "memory_mb": round(found["memory"] / 1e6, 1),
        }
        for name, found in figures.items()
    ]


def goals(figures: dict[str, dict]) -> list[dict]:
    """What is asked of the FFCV backend: goal, figure, whether it is met."""
    found = [
        (f"{least} x {name}", ratio(figures, OURS, name), lambda x, least=least: x >= least)
        for name, least in LEAST_RATIO.items()
    ]
    price = 1 - ratio(figures, OURS, FREE)
    found.append(
        (
            f"price of deterministic crops at most {DETERMINISTIC_PRICE}",
            price,
            lambda x: x <= DETERMINISTIC_PRICE,
        )
    )
    found.append(
        (
            f"first batch of a second run within {FIRST_BATCH_SECONDS} s",
            figures[OURS]["first_batch"][1],
            lambda x: x <= FIRST_BATCH_SECONDS,
        )
    )
    return [
        {"goal": goal, "found": round(value, 3), "met": met(value)} for goal, value, met in found
    ]


def show(table: list[dict], aims: list[dict]) -> None:
    """Print the table and the goals."""
    head = (
        "loader",
        "images/s",
        "ours ÷ it",
        "per CPU s",
        "ours ÷ it",
        "first batch s",
        "second run s",
        "memory MB",
    )
    lines = [head, *(tuple(str(value) for value in row.values()) for row in table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print(
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])),
            sep="  ",
        )
    for aim in aims:
        print(f"{'met   ' if aim['met'] else 'MISSED'}  {aim['goal']}: {aim['found']}")


def check(options: Options) -> int:
    """The number of workers. Raises ConfigError on options that cannot be meant."""
    ffcv_library()
    workers = share_of_cores() if options.workers is None else options.workers
    given = {
        "workers": workers,
        "rounds": options.rounds,
        "size": options.size,
        "batch": options.batch,
    }
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: give at least 1")
    if options.images < options.batch:
        raise ConfigError(f"images={options.images}: give at least batch={options.batch}")
    return workers


def main(options: Options) -> int:
    workers = check(options)
    storage = StorageOptions(options.max_side, options.jpeg_quality)
    listing = photographs(options.source, options.images)
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        folder = Path(name)
        size = lay_out(listing, folder, storage, workers, options.same_bytes)
        print(
            f"{len(listing.images)} images, mean bytes: {size['beton']} in the .beton file, {size['folder']} in the "
            f"folder; {workers} workers",
            flush=True,
        )
        figures = measure(
            Work(str(folder), options.size, options.batch, workers), options.rounds, folder
        )
    table, aims = rows(figures), goals(figures)
    show(table, aims)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(
            Path(options.json),
            {
                "benchmark": "loader",
                "options": {**asdict(options), "workers": workers},
                "images": len(listing.images),
                "mean_bytes": size,
                "load_average": os.getloadavg(),
                "machine": environment(),
                "table": table,
                "goals": aims,
                "figures": figures,
            },
        )
    return 0
