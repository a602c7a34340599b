"""The compiled loop: OpenCV's area interpolation, to within rounding, mirrored where asked; no more
rows than a crop needs."""

from __future__ import annotations

import ctypes
import io

import numpy as np
import pytest
from PIL import Image

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
    line = np.empty(image.size // image.shape[0], dtype=np.int32)
    kernel._fit(image.reshape(len(image), -1), box, flip, first, weights, line, out)
    return out


def opencvs(image: np.ndarray, box: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """FFCV's own call of cv::resize(…, INTER_AREA)."""
    out = np.zeros((rows, columns, 3), dtype=np.uint8)
    resize = ffcv_library().resize
    resize.argtypes = [
        ctypes.c_int64,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 6,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 2,
    ]
    top, left, height, width = box.tolist()
    sides = image.shape[0], image.shape[1]
    resize(
        0,
        image.ctypes.data,
        *sides,
        top,
        top + height,
        left,
        left + width,
        out.ctypes.data,
        rows,
        columns,
    )
    return out


def test_it_is_opencvs_area_interpolation(kernel):
    rng = np.random.default_rng(0)
    shrunk = 0
    for _ in range(300):
        height, width = rng.integers(4, 160, 2)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
        box = np.array([rng.integers(height - h + 1), rng.integers(width - w + 1), h, w])
        rows, columns = rng.integers(1, 3 * h // 2 + 2), rng.integers(1, 3 * w // 2 + 2)
        out = fitted(kernel, image, box, False, rows, columns)
        assert np.abs(out.astype(int) - opencvs(image, box, rows, columns)).max() <= 1
        assert np.array_equal(fitted(kernel, image, box, True, rows, columns), out[:, ::-1])
        shrunk += kernel._shrinkable(box, out)
    assert 30 < shrunk < 270


@pytest.mark.parametrize("value", [0, 1, 254, 255])
def test_a_flat_image_stays_flat(kernel, value):
    image = np.full((61, 95, 3), value, dtype=np.uint8)
    for rows, columns in ((61, 95), (60, 94), (31, 48), (30, 47), (21, 32)):
        assert (
            fitted(kernel, image, np.array([0, 0, 61, 95]), False, rows, columns) == value
        ).all()


def test_the_same_size_is_the_same_image(kernel):
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert np.array_equal(
        fitted(kernel, image, np.array([3, 5, 30, 40]), False, 30, 40), image[3:33, 5:45]
    )


def jpeg(height: int, width: int, **options) -> np.ndarray:
    """The bytes of a JPEG of smooth noise."""
    small = np.random.default_rng(height * width).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize((width, height)).convert(options.pop("mode", "RGB")).save(
        stream, "JPEG", **options
    )
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


def decoded(
    kernel, data: np.ndarray, height: int, width: int, bottom: int, known: bool
) -> tuple[bool, np.ndarray]:
    pixels = np.zeros(3 * height * width, dtype=np.uint8)
    good = kernel._decode(
        data, height, width, bottom, known, np.empty(data.size, dtype=np.uint8), pixels
    )
    return good, pixels.reshape(height, width, 3)


LAYOUTS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "restart markers": {"subsampling": 2, "restart_marker_blocks": 3},
    "gray": {"mode": "L"},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rows_of_a_crop_are_those_of_the_whole_image(kernel, layout):
    height, width = 141, 75
    data = jpeg(height, width, **LAYOUTS[layout])
    good, whole = decoded(kernel, data, height, width, height, True)
    assert good
    assert whole[-1].any()
    for bottom in range(1, height + 1):
        good, image = decoded(kernel, data, height, width, bottom, True)
        assert good
        assert np.array_equal(image[:bottom], whole[:bottom])
        below = image[min(height, -(-(bottom + 2) // 16) * 16) :]
        assert below.size == 0 or below.any() == (layout == "progressive")


def test_all_of_an_image_whose_bytes_are_not_known_is_decoded(kernel):
    data = jpeg(128, 64)
    assert decoded(kernel, data, 128, 64, 16, False)[1][-1].any()
    assert not decoded(kernel, data[: data.size // 2], 128, 64, 16, False)[0]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def test_a_header_within_a_comment_is_not_taken_for_the_image_s(kernel):
    """A fill byte before a comment, which a careless reader takes for a segment of 65,000 bytes …
    that ends in a lie."""
    data = jpeg(128, 128, subsampling=2).tobytes()
    frame = data[data.index(b"\xff\xc0") :][:19]
    scan = data[data.index(b"\xff\xda") :][:14]
    fill = b"\xff" + segment(0xFE, b"")  # read at its first byte: marker FF, length FE 00 and more
    lie = segment(0xFE, bytes(65_013)) + segment(0xFE, (frame + scan) * 20)
    for header in (
        fill + lie,
        segment(0xFE, frame + scan),
        fill,
        b"\xff\x01",
        b"\xff\xd0",
        b"\xff\xfe\x00\x00",
    ):
        planted = np.frombuffer(data[:2] + header + data[2:], dtype=np.uint8)
        good, whole = decoded(kernel, planted, 128, 128, 128, True)
        cut, image = decoded(kernel, planted, 128, 128, 40, True)
        assert cut == good
        assert np.array_equal(image[:40], whole[:40])


def test_a_frame_of_another_size_is_not_cut(kernel):
    data = jpeg(128, 128)
    assert kernel._height_place(data, 128, 128) == data.tobytes().index(b"\xff\xc0") + 5
    assert kernel._height_place(data, 128, 64) == kernel._height_place(data, 64, 128) == 0
