"""The compiled loop: OpenCV's area interpolation, to within rounding, mirrored on request."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import numpy as np
import pytest

from proxynorm.data.ffcv.native import decoder, ffcv_library
from tests.data.conftest import needs_ffcv

pytestmark = needs_ffcv


@pytest.fixture(scope="module")
def kernel():
    decoder()
    from proxynorm.data.ffcv import kernel

    return kernel


def fitted(
    kernel, image: np.ndarray, box: np.ndarray, flip: bool, rows: int, columns: int
) -> np.ndarray:
    out = np.zeros((rows, columns, 3), dtype=np.uint8)
    side = max(rows, columns)
    first, weights = np.empty((2, side), dtype=np.int64), np.empty((2, side, 4), dtype=np.int32)
    buffers = first, weights, np.empty(image.size // image.shape[0], dtype=np.int32)
    kernel._fit(image.reshape(len(image), -1), box, flip, buffers, out)
    return out


def opencvs(image: np.ndarray, box: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """FFCV's own call of cv::resize(…, INTER_AREA)."""
    out = np.zeros((rows, columns, 3), dtype=np.uint8)
    resize = ffcv_library().resize
    resize.argtypes = [c_int64, c_void_p, *[c_int64] * 6, c_void_p, *[c_int64] * 2]
    top, left, height, width = box.tolist()
    edges = top, top + height, left, left + width
    resize(0, image.ctypes.data, *image.shape[:2], *edges, out.ctypes.data, rows, columns)
    return out


def test_it_is_opencvs_area_interpolation(kernel):
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(4, 160, 2)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
        box = np.array([rng.integers(height - h + 1), rng.integers(width - w + 1), h, w])
        rows, columns = rng.integers(1, 3 * h // 2 + 2), rng.integers(1, 3 * w // 2 + 2)
        out = fitted(kernel, image, box, False, rows, columns)
        assert np.abs(out.astype(int) - opencvs(image, box, rows, columns)).max() <= 1
        assert np.array_equal(fitted(kernel, image, box, True, rows, columns), out[:, ::-1])


@pytest.mark.parametrize("value", [0, 1, 254, 255])
def test_a_flat_image_stays_flat(kernel, value):
    image = np.full((61, 95, 3), value, dtype=np.uint8)
    box = np.array([0, 0, 61, 95])
    for rows, columns in ((61, 95), (60, 94), (31, 48), (30, 47), (21, 32)):
        assert (fitted(kernel, image, box, False, rows, columns) == value).all()


def test_the_same_size_is_the_same_image(kernel):
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    box = np.array([3, 5, 30, 40])
    assert np.array_equal(fitted(kernel, image, box, False, 30, 40), image[3:33, 5:45])
