"""Crops, flips and erased boxes, the same for both backends.

They are drawn for a whole batch at once, from the samples' keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from proxynorm.data.randomness import uniform
from proxynorm.data.spec import DataSpec

# Positions in a sample's random stream. random_boxes draws four numbers per attempt.
FLIP, TOP, LEFT, ERASE = 0, 1, 2, 3
CROP_DRAWS, ERASE_DRAWS = 16, 64
ATTEMPTS = 10
CROP_RATIO = (3 / 4, 4 / 3)
ERASE_AREA, ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


def random_boxes(
    keys: np.ndarray, heights: np.ndarray, widths: np.ndarray, area: tuple, ratio: tuple, draws: int
) -> np.ndarray:
    """Draw boxes of random area and aspect ratio, int64 (N, 4): top, left, height, width, pixels.

    The distribution is that of torchvision's RandomResizedCrop.get_params: up to ten attempts at a
    box whose share of the area is uniform in `area` and whose log aspect ratio is uniform in
    log(`ratio`), else the largest centred box within `ratio`. draws: position of the first number
    in the streams `keys`.
    """
    heights, widths = heights.astype(np.float64), widths.astype(np.float64)
    numbers = uniform(keys[:, None, None], draws + np.arange(4 * ATTEMPTS).reshape(ATTEMPTS, 4))
    target = (heights * widths)[:, None] * (area[0] + (area[1] - area[0]) * numbers[..., 0])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * numbers[..., 1])
    width = np.rint(np.sqrt(target * aspect))
    height = np.rint(np.sqrt(target / aspect))
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    chosen = np.arange(len(keys)), fits.argmax(axis=1)
    height, width = height[chosen], width[chosen]
    top = np.floor(numbers[..., 2][chosen] * (heights - height + 1))
    left = np.floor(numbers[..., 3][chosen] * (widths - width + 1))
    boxes = np.stack([top, left, height, width], axis=1)
    boxes = np.where(fits.any(axis=1)[:, None], boxes, _widest_boxes(heights, widths, ratio))
    return boxes.astype(np.int64)


def _widest_boxes(heights: np.ndarray, widths: np.ndarray, ratio: tuple) -> np.ndarray:
    """Return the largest centred boxes within `ratio`, as in random_boxes."""
    height = np.minimum(heights, np.maximum(1, np.rint(widths / ratio[0])))
    width = np.minimum(widths, np.maximum(1, np.rint(heights * ratio[1])))
    return np.stack([(heights - height) // 2, (widths - width) // 2, height, width], axis=1)


def centre_boxes(heights: np.ndarray, widths: np.ndarray, ratio: float) -> np.ndarray:
    """Return centred squares whose side is `ratio` of the shorter side.

    int64 (N, 4): top, left, height, width.
    """
    side = np.maximum(1, (ratio * np.minimum(heights, widths)).astype(np.int64))
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def pad_to(images: np.ndarray, side: int) -> np.ndarray:
    """Centre images (N, h, w, C) on black images (N, side, side, C)."""
    height, width = images.shape[1:3]
    if (height, width) == (side, side):
        return images
    top, left = (side - height) // 2, (side - width) // 2
    bottom, right = side - height - top, side - width - left
    return np.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))


def pad_crop(
    images: np.ndarray, keys: np.ndarray, size: int, padding: int, flip: bool
) -> np.ndarray:
    """Crop zero-padded images at random: (N, h, w, C), h, w <= size -> (N, C, size, size)."""
    side = size + 2 * padding
    padded = pad_to(images, side)
    # All windows as a view: the indexing below copies one per image.
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    top = (uniform(keys, TOP) * (2 * padding + 1)).astype(np.int64)
    left = (uniform(keys, LEFT) * (2 * padding + 1)).astype(np.int64)
    out = windows[np.arange(len(images)), top, left]
    if flip:
        mirrored = uniform(keys, FLIP) < 0.5
        out[mirrored] = out[mirrored, :, :, ::-1]
    return out


def erase(images: np.ndarray, keys: np.ndarray, probability: float, colour: np.ndarray) -> None:
    """Fill a random box of some images (N, C, H, W) with colour (C,), in place.

    This is random erasing (arXiv 1708.04896). probability: that an image gets a box.
    """
    sides = np.array(images.shape[2:])[:, None].repeat(len(keys), axis=1)
    boxes = random_boxes(keys, sides[0], sides[1], ERASE_AREA, ERASE_RATIO, ERASE_DRAWS)
    for n in np.flatnonzero(uniform(keys, ERASE) < probability):
        top, left, height, width = boxes[n]
        images[n, :, top : top + height, left : left + width] = colour[:, None, None]


@dataclass(frozen=True)
class Transform:
    """The crops, flips and erased boxes of a DataSpec, for whole batches.

    A reader crops, resizes and flips while it decodes (`boxes`, `flips`), then calls `finish`.

    colour: the fill of erased boxes, uint8 per channel.
    """

    spec: DataSpec
    colour: tuple[int, ...] = (0,)

    def for_evaluation(self) -> Transform:
        """Return the transform for evaluation: a centre crop alone."""
        return Transform(
            replace(self.spec, augmentation="none", random_erasing=0.0, randaugment=None)
        )

    def boxes(self, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Return the part of each image that is resized to the output.

        int64 (N, 4): top, left, height, width.
        """
        spec = self.spec
        if spec.augmentation == "inception":
            return random_boxes(keys, heights, widths, (spec.min_area, 1.0), CROP_RATIO, CROP_DRAWS)
        ratio = spec.eval_ratio if spec.augmentation == "none" else 1.0
        return centre_boxes(heights, widths, ratio)

    def flips(self, keys: np.ndarray) -> np.ndarray:
        """Return which images the decoder mirrors, bool (N,). pad_crop mirrors in `finish`."""
        if self.spec.augmentation == "inception" and self.spec.flip:
            return uniform(keys, FLIP) < 0.5
        return np.zeros(len(keys), dtype=bool)

    def finish(self, images: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
        """Finish decoded images: uint8 (N, h, w, C), h, w <= size -> (N, C, size, size)."""
        spec = self.spec
        if spec.augmentation == "pad_crop":
            out = pad_crop(images, keys, size, spec.padding, spec.flip)
        else:
            out = pad_to(images, size).transpose(0, 3, 1, 2)
        if spec.random_erasing:
            erase(out, keys, spec.random_erasing, np.array(self.colour, dtype=np.uint8))
        return out
