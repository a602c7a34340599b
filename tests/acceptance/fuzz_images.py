"""Fuzz the reading of images: structured mutations of files of every format that is read.

  python tests/acceptance/fuzz_images.py 10000

Each mutated file must be read, or named with a one-line reason, by both loaders' readers; nothing
may raise. The suite runs a few hundred (test_fuzz.py).
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from proxynorm.data import images
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import BadImage, StorageOptions, load_rgb
from proxynorm.data.sources import list_source

# Format, ending, options. EXIF lies in the first four.
FORMATS = (
    ("JPEG", "jpg", {"quality": 90}),
    ("JPEG", "jpeg", {"progressive": True}),
    ("PNG", "png", {}),
    ("WEBP", "webp", {"quality": 80}),
    ("TIFF", "tif", {}),
    ("TIFF", "tiff", {"compression": "jpeg"}),
    ("GIF", "gif", {}),
    ("BMP", "bmp", {}),
    ("PPM", "ppm", {}),
    ("JPEG2000", "jp2", {}),
    *((("AVIF", "avif", {}),) if "AVIF" in images.FORMATS else ()),
)
HEADER = 700  # the structures of all formats begin within so many bytes
Mutation = Callable[[bytearray, np.random.Generator], bytearray]


def originals() -> list[tuple[str, bytes]]:
    """Return (ending, bytes) of a small photograph in every format, with EXIF where it has it."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((40, 30), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a camera", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    found = []
    for kind, ending, options in FORMATS:
        buffer = io.BytesIO()
        with_exif = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}
        image.save(buffer, kind, **options, **with_exif)
        found.append((ending, buffer.getvalue()))
    return found


def place(data: bytearray, rng: np.random.Generator) -> int:
    """Return a position, mostly in the header."""
    end = min(HEADER, len(data)) if rng.random() < 0.8 else len(data)
    return int(rng.integers(end))


def flip(data: bytearray, rng: np.random.Generator) -> bytearray:
    data[place(data, rng)] ^= 1 << int(rng.integers(8))
    return data


def extreme(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Write the bounds of an integer of 1, 2 or 4 bytes: lengths, offsets, sides, counts."""
    size, at = int(rng.choice([1, 2, 4])), place(data, rng)
    value = int(rng.choice([0, 1, 0x7F, 0xFF, 256**size - 1, 256**size // 2]))
    data[at : at + size] = (value % 256**size).to_bytes(size, str(rng.choice(["big", "little"])))
    return data


def cut(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data[: place(data, rng)]


def remove(data: bytearray, rng: np.random.Generator) -> bytearray:
    at = place(data, rng)
    del data[at : at + int(rng.integers(1, 64))]
    return data


def repeat(data: bytearray, rng: np.random.Generator) -> bytearray:
    at, length = place(data, rng), int(rng.integers(1, 64))
    data[at:at] = data[at : at + length]
    return data


def rubbish(data: bytearray, rng: np.random.Generator) -> bytearray:
    at = place(data, rng)
    data[at : at + int(rng.integers(1, 32))] = rng.bytes(int(rng.integers(1, 32)))
    return data


MUTATIONS: tuple[Mutation, ...] = (flip, extreme, cut, remove, repeat, rubbish)


def write_mutants(folder: Path, count: int, seed: int = 0) -> None:
    """Fill folder/a with `count` mutated images, some under another format's ending."""
    rng, files = np.random.default_rng(seed), originals()
    (folder / "a").mkdir(parents=True)
    for number in range(count):
        ending, content = files[number % len(files)]
        data = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            if data:
                data = MUTATIONS[rng.integers(len(MUTATIONS))](data, rng)
        if rng.random() < 0.1:
            ending = files[rng.integers(len(files))][0]
        (folder / "a" / f"{number:05d}.{ending}").write_bytes(data)


def fuzz(folder: Path, count: int, workers: int = 1) -> Counter:
    """Read `count` mutants in both ways; count outcomes. Raises AssertionError for a bad reason."""
    write_mutants(folder / "images", count)
    for ending, content in originals():  # a class needs an image that is whole
        (folder / "images" / "a" / f"whole.{ending}").write_bytes(content)
    listing = list_source(folder / "images")
    outcomes: Counter[str] = Counter()
    for ref in listing.images:
        try:
            image = load_rgb(ref)
        except BadImage as reason:
            assert_one_line(str(reason))
            outcomes["named by torchvision's reader"] += 1
        else:
            assert image.mode == "RGB" and min(image.size) > 0
            outcomes["read by torchvision's reader"] += 1
    done = prepare(listing, folder / "x.beton", StorageOptions(), "skip", workers)
    for reason in done.manifest["skipped"].values():
        assert_one_line(reason)
    assert len(done) + len(done.manifest["skipped"]) == len(listing.images)
    assert not any("whole." in name for name in done.manifest["skipped"])
    outcomes["written to the .beton file"] = len(done)
    outcomes["named by the writer"] = len(done.manifest["skipped"])
    return outcomes


def assert_one_line(reason: str) -> None:
    assert reason and "\n" not in reason and reason.isprintable(), repr(reason)


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    place_of_files = Path(tempfile.mkdtemp(prefix="proxynorm-fuzz-"))
    try:
        for outcome, files in fuzz(place_of_files, number, workers=2).items():
            print(f"{files:6d} {outcome}")
    finally:
        shutil.rmtree(place_of_files)
