"""Photographs to measure loaders on, where one has no ImageNet at hand: JPEGs of 500x375 pixels in class folders.

They are collages of the photographs among the stamps of Debian's package tuxpaint-stamps-default: cut-out animals,
plants, vehicles… at one to two times their resolution, so that the JPEGs are about as large as ImageNet's. The pieces
of an image and their places follow from its number alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from proxynorm.errors import DataError

STAMPS = Path("/usr/share/tuxpaint/stamps")
SIZE = (500, 375)
QUALITY = 95
CLASSES = 16
# Drawings have few colours; photographs have nearly as many as pixels.
LEAST_PIXELS, LEAST_COLOURS, LEAST_SHARE = 200 * 200, 8_000, 0.3
OPAQUE = 250
PIECES, SCALES = 8, (1.0, 2.0)


def find_photographs(folder: Path = STAMPS) -> list[Image.Image]:
    """The stamps that are photographs, RGBA, sorted by path. Raises DataError if there are none."""
    paths = sorted(folder.rglob("*.png"))
    found = [
        image
        for image in (Image.open(path).convert("RGBA") for path in paths)
        if is_photograph(image)
    ]
    if not found:
        raise DataError(
            f"{folder}: holds no photographs; apt-get install tuxpaint-stamps-default, or give source=DIR"
        )
    return found


def is_photograph(image: Image.Image) -> bool:
    """Whether a stamp is large and has about as many colours as a photograph."""
    if image.width * image.height < LEAST_PIXELS:
        return False
    pixels = np.asarray(image)
    visible = pixels[pixels[..., 3] > OPAQUE][:, :3].astype(np.uint32)
    colours = len(np.unique(visible @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)))
    return colours >= max(LEAST_COLOURS, LEAST_SHARE * len(visible))


def collage(photographs: list[Image.Image], rng: np.random.Generator) -> Image.Image:
    """One image of SIZE: pieces of photographs over a colour gradient."""
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    canvas = Image.fromarray(corners).resize(SIZE, Image.Resampling.BILINEAR)
    for index in rng.integers(len(photographs), size=PIECES):
        piece = photographs[index]
        scale = rng.uniform(*SCALES)
        piece = piece.resize(
            [max(1, round(side * scale)) for side in piece.size], Image.Resampling.BILINEAR
        )
        if rng.random() < 0.5:
            piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        centre = rng.uniform(0, 1, 2) * SIZE
        canvas.paste(piece, tuple((centre - np.array(piece.size) / 2).astype(int).tolist()), piece)
    return canvas


def make_photographs(folder: Path, count: int) -> Path:
    """folder/CLASS/*.jpg, `count` in all; what is there already is kept."""
    missing = [number for number in range(count) if not image_path(folder, number).is_file()]
    photographs = find_photographs() if missing else []
    for number in missing:
        path = image_path(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        collage(photographs, np.random.default_rng(number)).save(path, quality=QUALITY)
    return folder


def image_path(folder: Path, number: int) -> Path:
    """Where image `number` lies."""
    return folder / f"class{number % CLASSES:02d}" / f"{number:05d}.jpg"
