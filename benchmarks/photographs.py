"""Images to measure loaders on: those of a folder, or noise with a photograph's spectrum.

The noise is stored as JPEGs of 500×375 pixels, about as large as ImageNet's. Each image depends on
its number alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from proxynorm.data.randomness import permutation
from proxynorm.data.sources import Listing, list_source
from proxynorm.files import cache_folder

WIDTH, HEIGHT, CLASSES = 500, 375, 16
SOURCE = "folder of class folders; if left out, images are generated in the cache"


def photographs(source: str | None, count: int) -> Listing:
    """Return `count` images, drawn at random from `source`'s class folders or generated."""
    if source is None:
        folder = make_images(cache_folder(None) / "benchmark-images", count)
    else:
        folder = Path(source)
    listing = list_source(folder)
    rows = np.sort(permutation(0, 0, len(listing.images))[:count])
    images = [listing.images[row] for row in rows]
    return listing._replace(images=images, targets=listing.targets[rows])


def make_images(folder: Path, count: int) -> Path:
    """Write `count` images as folder/CLASS/*.jpg. Existing ones are kept."""
    for number in range(count):
        path = folder / f"class{number % CLASSES:02d}" / f"{number:05d}.jpg"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            make_image(number).save(path, quality=95)
    return folder


def make_image(number: int) -> Image.Image:
    """Return noise with a photograph's spectrum and nearly grey colours."""
    noise = np.random.default_rng(number).standard_normal((3, HEIGHT, WIDTH))
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    frequency[0, 0] = np.inf  # the mean is set below
    # With this exponent, a JPEG of quality 90 takes 53 kB. ImageNet's mean is 51 kB.
    waves = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.5, (HEIGHT, WIDTH))
    waves /= waves.std()
    pixels = 128 + 50 * waves[0] + 15 * waves
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
