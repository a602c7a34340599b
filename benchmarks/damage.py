"""Prepare images with planted damage: every damaged image must be named, and no other.

  python scripts/benchmark.py damage images=10000 json=results/loader/damage.json

Some images are damaged in every known way, others are merely unusual. Afterwards the finished
.beton file is damaged, and verification must find exactly that.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks import common
from benchmarks.loader import SOURCE
from benchmarks.photographs import photographs
from proxynorm.cli import option
from proxynorm.data.ffcv.beton import changed_images, read_beton
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.images import StorageOptions, load_rgb
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import list_folder
from proxynorm.errors import ConfigError

CLASSES, SIZE, HUGE = 10, (160, 120), (4000, 3000)
ORIENTATION, ROTATED = 0x0112, 6


def encoded(image: Image.Image, mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def overwritten(image: Image.Image) -> bytes:
    """A JPEG with markers in the middle of its data."""
    data = encoded(image)
    middle = len(data) // 2
    return data[:middle] + b"\xff\xd9\x00\x13" * 25 + data[middle + 100 :]


def rotated(image: Image.Image) -> bytes:
    """A JPEG turned by its EXIF tag."""
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED
    return encoded(image, exif=exif)


DAMAGED: dict[str, Callable[[Image.Image], bytes]] = {
    "zero bytes": lambda image: b"",
    "truncated": lambda image: encoded(image)[:-300],
    "cut in the header": lambda image: encoded(image)[:100],
    "overwritten": overwritten,
    "a web page": lambda image: b"<html>404 Not Found</html>",
    "truncated PNG": lambda image: encoded(image, kind="PNG")[:-500],
}
UNUSUAL: dict[str, Callable[[Image.Image], bytes]] = {
    "CMYK": lambda image: encoded(image, "CMYK"),
    "grey": lambda image: encoded(image, "L"),
    "PNG named JPEG": lambda image: encoded(image, kind="PNG"),
    "EXIF rotation": rotated,
    "progressive": lambda image: encoded(image, progressive=True),
    "huge": lambda image: encoded(image.resize(HUGE)),
}


@dataclass
class Options(common.Options):
    source: str | None = option(None, SOURCE)
    images: int = option(10_000, "how many images")
    share: float = option(0.01, "share of damaged images, and of unusual ones")
    workers: int | None = option(None, "processes; all cores if left out")


def main(options: Options) -> int:
    common.require_positive(options, "images", "workers")
    if not 0 < options.share <= 0.5 or round(options.images * options.share) < 1:
        raise ConfigError(
            f"images={options.images} share={options.share}: damage at least one and at most half"
        )
    listing = photographs(options.source, 64)
    base = [ImageOps.fit(load_rgb(image), SIZE) for image in listing.images]
    workers = options.workers or share_of_cores()
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        found = judge(plant(base, options, Path(name) / "images"), Path(name), workers)
    for key, value in found.items():
        print(f"{key}: {value}")
    common.write_figures(options, {"workers": workers, **found})
    return 1 if found["missed"] or found["wrongly_named"] or found["changed_missed"] else 0


def plant(base: list[Image.Image], options: Options, folder: Path) -> dict[str, str]:
    """Fill folder/CLASS/ with the base images in turn; returns {path of an odd one: its kind}."""
    count = round(options.images * options.share)
    rows = np.random.default_rng(0).permutation(options.images)[: 2 * count].tolist()
    kinds = [*islice(cycle(DAMAGED), count), *islice(cycle(UNUSUAL), count)]
    odd, planted = dict(zip(rows, kinds)), {}
    for number in range(options.images):
        path = folder / f"class{number % CLASSES}" / f"{number:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = odd.get(number)
        make = (DAMAGED | UNUSUAL).get(kind, encoded)
        path.write_bytes(make(base[number % len(base)]))
        if kind:
            planted[str(path)] = kind
    return planted


def flip_bits(path: Path, rows: np.ndarray) -> None:
    """Change one bit in the middle of these images of a .beton file."""
    samples = read_beton(path)
    # Pixels change but the JPEG may still decode, so that only the checksum tells.
    data = np.memmap(path, np.uint8, "r+")
    data[samples.pointer[rows] + samples.size[rows] // 2] ^= 1
    data.flush()


def judge(planted: dict[str, str], folder: Path, workers: int) -> dict:
    """Prepare the images, then damage the file: counts, and what was missed or wrongly named."""
    listing = list_folder(folder / "images")
    start = time.perf_counter()
    done = prepare(listing, folder / "out.beton", StorageOptions(), "skip", workers)
    elapsed = time.perf_counter() - start
    damaged = {path for path, kind in planted.items() if kind in DAMAGED}
    rows = np.random.default_rng(1).permutation(done.count)[: max(1, done.count // 100)]
    flip_bits(done.path, rows)
    found = set(changed_images(read_beton(done.path)))
    changed = {f"{done.path}: image {row}" for row in rows}
    wrong = set(done.skipped) - damaged
    return {
        "images": len(listing.images),
        "written": done.count,
        "seconds": round(elapsed, 1),
        "planted": dict(sorted(Counter(planted.values()).items())),
        "missed": sorted(planted[path] for path in damaged - set(done.skipped)),
        "wrongly_named": sorted(planted.get(path, "an ordinary image") for path in wrong),
        "changed_after_preparation": len(changed),
        "changed_missed": len(changed - found),
        "changed_wrongly_named": len(found - changed),
    }
