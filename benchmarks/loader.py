"""Images a second of six loaders on the same JPEGs: ours, FFCV's, torchvision's, timm's.

  python scripts/benchmark.py loader source=DIR json=results/loader/NAME.json

source is a folder of class folders; without it, photographs are made from Debian's
tuxpaint-stamps-default. Each loader has a process of its own and as many workers; they take turns,
an epoch at a time. FFCV's loaders read the .beton file that write_ffcv.py makes of the source, the
others the source's own files or, with same_bytes=true, the JPEGs of the .beton file.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.contenders import CONTENDERS, Work, run_epoch
from benchmarks.photographs import photographs
from proxynorm.analysis.tables import text_table
from proxynorm.cli import option
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.ffcv.native import ffcv_library
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import Listing
from proxynorm.errors import ConfigError

OURS = "proxynorm ffcv"
SPEED, CPU_SPEED = "images_per_second", "images_per_cpu_second"
SAMPLE_SECONDS = 0.1
CLOCK_TICK = 1 / os.sysconf("SC_CLK_TCK")  # the resolution of processor time
SOURCE = "folder of class folders; left out: photographs are made, once, into the cache"


@dataclass
class Options(common.Options):
    source: str | None = option(None, SOURCE)
    images: int = option(2048, "how many of its images, drawn at random, or made")
    size: int = option(224, "side of the crop, pixels")
    batch: int = option(64, "images a batch")
    workers: int | None = option(None, "threads or processes of each loader; all cores if left out")
    rounds: int = option(7, "epochs of each loader, taken in turns")
    max_side: int | None = option(500, "longest side in the .beton file, pixels; null: as it is")
    jpeg_quality: int = option(90, "JPEG quality in the .beton file")
    same_bytes: bool = option(False, "torchvision and timm read the .beton file's JPEGs")


def main(options: Options) -> None:
    ffcv_library()
    check(options)
    workers = options.workers or share_of_cores()
    listing = photographs(options.source, options.images)
    storage = StorageOptions(options.max_side, options.jpeg_quality)
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        size = lay_out(listing, Path(name), storage, workers, options.same_bytes)
        print(
            f"{len(listing.images)} images, mean bytes: {size['beton']} in the .beton file, "
            f"{size['folder']} in the folder; {workers} workers",
            flush=True,
        )
        work = Work(name, options.size, options.batch, workers)
        figures = measure(work, options.rounds, Path(name))
    table = rows(figures)
    header = ("loader", "images/s", "ours ÷ it", "per CPU s", "ours ÷ it")
    header = (*header, "first batch s", "second run s", "memory MB")
    print(text_table(header, [[str(value) for value in row.values()] for row in table]))
    content = {"workers": workers, "images": len(listing.images), "mean_bytes": size}
    common.write_figures(options, {**content, "table": table, "figures": figures})


def check(options: Any) -> None:
    """Raise ConfigError for numbers below 1 or fewer images than a batch."""
    common.require_positive(options, "workers", "rounds", "size", "batch")
    if options.images < options.batch:
        raise ConfigError(f"images={options.images}: give at least batch={options.batch}")


def lay_out(
    listing: Listing, folder: Path, storage: StorageOptions, workers: int, same_bytes: bool
) -> dict[str, int]:
    """Make folder/train.beton and folder/train/CLASS/*, and val alike; returns the images' mean
    bytes."""
    beton = prepare(listing, folder / "train.beton", storage, "raise", workers).path
    samples, data = read_beton(beton), np.memmap(beton, dtype=np.uint8, mode="r")
    sizes = []
    for row, image in enumerate(listing.images):
        source = Path(image.path).resolve()
        path = folder / "train" / listing.classes[listing.targets[row]] / f"{row:07d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if same_bytes:
            start, size = int(samples.pointer[row]), int(samples.size[row])
            path.with_suffix(".jpg").write_bytes(data[start : start + size])
        else:
            size = source.stat().st_size
            path.with_suffix(source.suffix).symlink_to(source)
        sizes.append(size)
    for name in ("", ".beton", ".beton.json", ".beton.sums.npy"):
        (folder / f"val{name}").symlink_to(f"train{name}")
    return {"beton": round(float(samples.size.mean())), "folder": round(float(np.mean(sizes)))}


class LoaderProcess:
    """A process that runs epochs of one loader; time and memory are read from outside (Linux)."""

    def __init__(self, name: str, work: Work) -> None:
        self.name, self.work, self.pool = name, work, common.new_process()
        self.pid = self.pool.submit(os.getpid).result()

    def epoch(self) -> dict[str, float]:
        """Run an epoch: run_epoch's figures, but CPU seconds of the workers too."""
        before = cpu_seconds_of(self.pid)
        answer = self.pool.submit(run_epoch, self.name, self.work).result()
        return {**answer, "cpu_seconds": max(cpu_seconds_of(self.pid) - before, CLOCK_TICK)}

    def epoch_memory(self) -> int:
        """Run an epoch and return the most memory seen meanwhile, bytes."""
        epoch, most = self.pool.submit(run_epoch, self.name, self.work), 0
        while not epoch.done():
            most = max(most, memory_of(self.pid))
            time.sleep(SAMPLE_SECONDS)
        epoch.result()
        return max(most, memory_of(self.pid))

    def __enter__(self) -> LoaderProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()


def process_tree(pid: int) -> list[Any]:
    """The process and all its living descendants."""
    import psutil  # FFCV requires it

    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def memory_of(pid: int) -> int:
    """Bytes of a process tree, shared pages counted once and files' pages left out."""
    total = 0
    for process in process_tree(pid):
        with suppress(OSError):  # it ended meanwhile
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            counted = [line for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
            total += sum(1024 * int(line.split()[1]) for line in counted)
    return total


def cpu_seconds_of(pid: int) -> float:
    """Processor time of a process tree so far, awaited children included."""
    times = (process.cpu_times() for process in process_tree(pid))
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def measure(work: Work, rounds: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Per loader: speeds of each round, seconds to the first batch of a first and a second process,
    memory in bytes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, dict[str, Any]] = {}
    processes = {}
    with ExitStack() as stack:
        for number, name in enumerate(CONTENDERS):
            # An empty cache, so that numba compiles in the first process and not in the second.
            os.environ["NUMBA_CACHE_DIR"] = str(folder / f"numba{number}")
            with LoaderProcess(name, work) as process:
                first = process.epoch()["first_batch"]
            processes[name] = stack.enter_context(LoaderProcess(name, work))
            second = processes[name].epoch()["first_batch"]
            # In an epoch of its own, because reading a process's memory slows it.
            memory = processes[name].epoch_memory()
            figures[name] = {"first_batch": [first, second], "memory": memory}
            figures[name] |= {SPEED: [], CPU_SPEED: []}
            print(f"{name}: first batch after {first:.1f} s, in a second process {second:.1f} s")
        for number in range(rounds):
            # Every other round backwards, so that no loader always follows the same one.
            for name in list(CONTENDERS)[:: 1 - 2 * (number % 2)]:
                answer = processes[name].epoch()
                figures[name][SPEED].append(answer["images"] / answer["seconds"])
                figures[name][CPU_SPEED].append(answer["images"] / answer["cpu_seconds"])
            print(f"round {number + 1} of {rounds}", flush=True)
    return figures


def rows(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: a row a loader."""
    ours = figures[OURS]
    return [
        {
            "loader": name,
            "images_per_second": round(median(found[SPEED]), 1),
            "ours_over_it": round(common.ratio(ours[SPEED], found[SPEED]), 3),
            "images_per_cpu_second": round(median(found[CPU_SPEED]), 1),
            "ours_over_it_per_cpu_second": round(
                common.ratio(ours[CPU_SPEED], found[CPU_SPEED]), 3
            ),
            "first_batch_seconds": round(found["first_batch"][0], 2),
            "first_batch_seconds_second_run": round(found["first_batch"][1], 2),
            "memory_mb": round(found["memory"] / 1e6, 1),
        }
        for name, found in figures.items()
    ]
