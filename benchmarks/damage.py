"""Prepare images with planted damage: every damaged image must be named, and no other.

  python scripts/benchmark.py damage images=10000 json=results/loader/damage.json

Some images are damaged in every known way, others are merely unusual.
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
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks import common
from benchmarks.photographs import SOURCE, photographs
from proxynorm.cli import option
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions, load_rgb
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import list_source
from proxynorm.errors import ConfigError

CLASSES, SIZE, HUGE = 10, (160, 120), (4000, 3000)
BASES = 64  # different images, before damage
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: a quarter turn


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
    "EXIF rotation": lambda image: encoded(image, exif=ROTATED),
    "progressive": lambda image: encoded(image, progressive=True),
    "huge": lambda image: encoded(image.resize(HUGE)),
}
MAKERS = DAMAGED | UNUSUAL


@dataclass
class Options(common.Options):
    source: str | None = option(None, SOURCE)
    images: int = option(10_000, "how many images; of each kind, one in 600 and at least one")
    workers: int | None = option(None, "threads; all cores if left out")


def main(options: Options) -> int:
    common.check(options)
    if options.images < 2 * len(MAKERS):
        raise ConfigError(f"images={options.images}: give at least {2 * len(MAKERS)}")
    workers = options.workers or share_of_cores()
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        planted = plant(options, Path(name) / "images")
        start = time.perf_counter()
        listing = list_source(Path(name) / "images")
        samples = prepare(listing, Path(name) / "out.beton", StorageOptions(), "skip", workers)
        elapsed = time.perf_counter() - start
    named = set(samples.manifest["skipped"])
    damaged = {path for path, kind in planted.items() if kind in DAMAGED}
    found: dict[str, Any] = {
        "images": len(listing.images),
        "written": len(samples),
        "seconds": round(elapsed, 1),
        "planted": dict(sorted(Counter(planted.values()).items())),
        "missed": sorted(planted[path] for path in damaged - named),
        "wrongly_named": sorted(planted.get(path, "an ordinary image") for path in named - damaged),
    }
    for key, value in found.items():
        print(f"{key}: {value}")
    common.write_figures(options, {"workers": workers, **found})
    return 1 if found["missed"] or found["wrongly_named"] else 0


def plant(options: Options, folder: Path) -> dict[str, str]:
    """Fill folder/CLASS/ with few images in turn; returns {path of an odd one: its kind}."""
    listing = photographs(options.source, BASES)
    bases = cycle([ImageOps.fit(load_rgb(image), SIZE) for image in listing.images])
    rows = np.random.default_rng(0).permutation(options.images).tolist()
    odd = dict(zip(rows, [*MAKERS] * max(1, options.images // 600)))
    planted = {}
    for number, base in enumerate(islice(bases, options.images)):
        path = folder / f"class{number % CLASSES}" / f"{number:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = odd.get(number)
        if kind is not None:
            planted[str(path)] = kind
        path.write_bytes(MAKERS.get(kind, encoded)(base))
    return planted
