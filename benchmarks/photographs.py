"""Photographs to measure loaders on: a folder of images, or collages where there is none.

The collages are JPEGs of 500×375 pixels, composed of the photographs in Debian's package
tuxpaint-stamps-default at one to two times their resolution, so that the files are about as large
as ImageNet's. An image follows from its number alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from proxynorm.data.cache import cache_folder
from proxynorm.data.randomness import permutation
from proxynorm.data.sources import Listing, list_folder
from proxynorm.errors import ConfigError, DataError

STAMPS = Path("/usr/share/tuxpaint/stamps")
SIZE = (500, 375)
QUALITY = 95
CLASSES = 16
# Drawings have few colours; photographs have nearly as many as pixels.
LEAST_PIXELS, LEAST_COLOURS, LEAST_SHARE = 200 * 200, 8_000, 0.3
OPAQUE = 250
PIECES, SCALES = 8, (1.0, 2.0)


def photographs(source: str | None, count: int) -> Listing:
    """`count` images drawn at random from the class folders in `source`, or made into the cache."""
    if count < 1:
        raise ConfigError(f"images={count}: give at least 1")
    if source is None:
        folder = make_photographs(cache_folder(None) / "benchmark-photographs", count)
    else:
        folder = Path(source)
    listing = list_folder(folder)
    rows = np.sort(permutation(0, 0, len(listing.images))[:count])
    return Listing(listing.classes, [listing.images[row] for row in rows], listing.targets[rows])


def make_photographs(folder: Path, count: int) -> Path:
    """Make folder/CLASS/*.jpg, `count` in all; existing ones are kept."""
    paths = [folder / f"class{i % CLASSES:02d}" / f"{i:05d}.jpg" for i in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    stamps = find_photographs() if missing else []
    for number in missing:
        paths[number].parent.mkdir(parents=True, exist_ok=True)
        collage(stamps, np.random.default_rng(number)).save(paths[number], quality=QUALITY)
    return folder


def find_photographs(folder: Path = STAMPS) -> list[Image.Image]:
    """The stamps that are photographs, RGBA, sorted by path. Raises DataError if there are none."""
    stamps = (Image.open(path).convert("RGBA") for path in sorted(folder.rglob("*.png")))
    found = [image for image in stamps if is_photograph(image)]
    if not found:
        raise DataError(
            f"{folder}: holds no photographs; apt-get install tuxpaint-stamps-default, "
            "or give source=DIR"
        )
    return found


def is_photograph(image: Image.Image) -> bool:
    """Tell large stamps with about as many colours as a photograph from drawings."""
    if image.width * image.height < LEAST_PIXELS:
        return False
    pixels = np.asarray(image)
    visible = pixels[pixels[..., 3] > OPAQUE][:, :3].astype(np.uint32)
    colours = len(np.unique(visible @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)))
    return colours >= max(LEAST_COLOURS, LEAST_SHARE * len(visible))


def collage(stamps: list[Image.Image], rng: np.random.Generator) -> Image.Image:
    """One image of SIZE: pieces of photographs over a colour gradient."""
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    canvas = Image.fromarray(corners).resize(SIZE, Image.Resampling.BILINEAR)
    for index in rng.integers(len(stamps), size=PIECES):
        piece, scale = stamps[index], rng.uniform(*SCALES)
        size = [max(1, round(side * scale)) for side in piece.size]
        piece = piece.resize(size, Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        centre = rng.uniform(0, 1, 2) * SIZE
        canvas.paste(piece, tuple((centre - np.array(piece.size) / 2).astype(int).tolist()), piece)
    return canvas
