"""Prepare a set of images, some of them damaged in every known way and others merely unusual: every damaged one must be
named, and no other; then damage the finished file: reading must find exactly that.

  python scripts/benchmark.py damage images=10000 json=results/loader/damage.json
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.loader import photographs
from proxynorm.cli import option
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.ffcv.verification import find_damage
from proxynorm.data.images import StorageOptions, load_rgb
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import Listing, list_folder
from proxynorm.errors import ConfigError
from proxynorm.files import write_json
from proxynorm.train.run_folder import environment

CLASSES, SIZE, HUGE = 10, (160, 120), (4000, 3000)
ORIENTATION, ROTATED = 0x0112, 6


def encoded(image: Image.Image, mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    """The image as bytes of a format."""
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def overwritten(data: bytes) -> bytes:
    """With markers in the middle of the data."""
    middle = len(data) // 2
    return data[:middle] + b"\xff\xd9\x00\x13" * 25 + data[middle + 100 :]


def rotated(image: Image.Image) -> bytes:
    """Turned by its EXIF tag."""
    exif = Image.Exif()
    exif[ORIENTATION] = ROTATED
    return encoded(image, exif=exif)


DAMAGED: dict[str, Callable[[Image.Image], bytes]] = {
    "zero bytes": lambda image: b"",
    "truncated": lambda image: encoded(image)[:-300],
    "cut in the header": lambda image: encoded(image)[:100],
    "overwritten": lambda image: overwritten(encoded(image)),
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
class Options:
    source: str | None = option(
        None, "folder of class folders; left out: photographs are made, once, into the cache"
    )
    images: int = option(10_000, "how many images")
    share: float = option(0.01, "share of damaged images, and of unusual ones")
    workers: int | None = option(None, "processes; all cores if left out")
    json: str | None = option(None, "file for the figures, with the machine's description")


def plant(base: list[Image.Image], options: Options, folder: Path) -> dict[str, str]:
    """folder/CLASS/NUMBER.JPEG: pieces of the base images. Returns the odd ones, path -> what was done to them."""
    rng = np.random.default_rng(0)
    number_odd = round(options.images * options.share)
    places = rng.permutation(options.images)[: 2 * number_odd]
    kinds = [*DAMAGED] * number_odd, [*UNUSUAL] * number_odd
    odd = dict(zip(places.tolist(), [*kinds[0][:number_odd], *kinds[1][:number_odd]]))
    planted = {}
    for number in range(options.images):
        image = base[rng.integers(len(base))]
        left, top = (int(rng.integers(side - piece + 1)) for side, piece in zip(image.size, SIZE))
        piece = image.crop((left, top, left + SIZE[0], top + SIZE[1]))
        path = folder / f"class{number % CLASSES}" / f"{number:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = odd.get(number)
        path.write_bytes((DAMAGED | UNUSUAL)[kind](piece) if kind else encoded(piece))
        if kind:
            planted[str(path)] = kind
    return planted


def change_bytes(path: Path, rows: np.ndarray) -> None:
    """Change one bit in the middle of these images of a .beton file."""
    samples = read_beton(path)
    with open(path, "r+b") as file:
        for position in (samples.pointer[rows] + samples.size[rows] // 2).tolist():
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))


def judge(listing: Listing, planted: dict[str, str], folder: Path, workers: int) -> dict:
    """Prepare, then damage what was prepared: what was planted, found, missed and wrongly named."""
    start = time.perf_counter()
    done = prepare(listing, folder / "out.beton", StorageOptions(), "skip", workers)
    seconds = time.perf_counter() - start
    damaged = {path for path, kind in planted.items() if kind in DAMAGED}
    rows = np.random.default_rng(1).permutation(done.count)[: max(1, done.count // 100)]
    change_bytes(done.path, rows)
    found = set(find_damage(read_beton(done.path), workers))
    changed = {f"{done.path}: image {row}" for row in rows}
    return {
        "images": len(listing.images),
        "written": done.count,
        "seconds": round(seconds, 1),
        "planted": dict(sorted(Counter(planted.values()).items())),
        "missed": sorted(planted[path] for path in damaged - set(done.skipped)),
        "wrongly_named": sorted(
            planted.get(path, "an ordinary image") for path in set(done.skipped) - damaged
        ),
        "changed_after_preparation": len(changed),
        "changed_missed": len(changed - found),
        "changed_wrongly_named": len(found - changed),
    }


def main(options: Options) -> int:
    if not 0 < options.share <= 0.5 or round(options.images * options.share) < 1:
        raise ConfigError(
            f"images={options.images} share={options.share}: damage at least one and at most half"
        )
    workers = share_of_cores() if options.workers is None else options.workers
    base = [load_rgb(image) for image in photographs(options.source, 64).images]
    if any(side < piece for image in base for side, piece in zip(image.size, SIZE)):
        raise ConfigError(
            f"source={options.source}: give images of at least {SIZE[0]}x{SIZE[1]} pixels"
        )
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        folder = Path(name)
        planted = plant(base, options, folder / "images")
        found = judge(list_folder(folder / "images"), planted, folder, workers)
    for key, value in found.items():
        print(f"{key}: {value}")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(
            Path(options.json),
            {
                "benchmark": "damage",
                "options": {**asdict(options), "workers": workers},
                "load_average": os.getloadavg(),
                "machine": environment(),
                **found,
            },
        )
    return 0 if not (found["missed"] or found["wrongly_named"] or found["changed_missed"]) else 1
