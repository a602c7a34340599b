"""The decoding loop of the FFCV backend, compiled by numba.

Import it through native.decoder, which first registers the symbols of FFCV's library.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from proxynorm.data.ffcv.beton import JPEG, WEIGHT, WEIGHT_TAIL
from proxynorm.data.ffcv.native import BAD_JPEG, BAD_SUM, GOOD

_u32, _i64, _pointer = types.uint32, types.int64, types.uintp
# FFCV's libffcv.py names the arguments of both, in imdecode and resize_crop.
_imdecode = types.ExternalFunction(
    "proxynorm_ffcv_imdecode",
    types.int32(
        *(_pointer, types.uint64, _u32, _u32, _pointer), *[_u32] * 6, types.boolean, types.boolean
    ),
)
_resize = types.ExternalFunction("proxynorm_ffcv_resize", types.void(*([_i64] * 11)))
# Fixed-point bits of the weights in _shrink: a pixel's 8 bits and two weights fit into 31 bits.
BITS = 11
# _shrink averages TAPS x TAPS pixels: TAPS cover any span of MOST_SHRUNK, wherever it begins.
TAPS, MOST_SHRUNK = 4, 3
THREE = np.uint64(3)
# nogil: threads decode in parallel. cache: compiling takes seconds.
_options = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}


@numba.njit(**_options)
def _byte_sum(data):
    """Compute beton.byte_sum without copying the data."""
    whole = data.size // 8
    total = np.uint64(0)
    weight = WEIGHT
    for word in range(whole):
        start = 8 * word
        value = np.uint64(0)
        for byte in range(8):
            value |= np.uint64(data[start + byte]) << np.uint64(8 * byte)
        total += value * weight
        weight += np.uint64(2) * WEIGHT
    value = np.uint64(0)
    for byte in range(data.size - 8 * whole):
        value |= np.uint64(data[8 * whole + byte]) << np.uint64(8 * byte)
    return total + (value ^ np.uint64(data.size)) * WEIGHT_TAIL


@numba.njit(**_options)
def _area_weights(length, size, first, weights):
    """Compute the weights that average `length` pixels to `size` <= length.

    Output pixel n is the sum of the TAPS pixels from first[n] on, times weights[n] / 2^BITS.
    """
    scale = length / size
    one = np.int32(1 << BITS)
    for n in range(size):
        start, end = n * scale, min((n + 1) * scale, np.float64(length))
        first[n] = min(np.int64(start), length - TAPS)
        total, largest = np.int32(0), 0
        for k in range(TAPS):
            covered = max(0.0, min(end, first[n] + k + 1.0) - max(start, first[n] + k + 0.0))
            weights[n, k] = np.int32(np.rint(covered / scale * one))
            total += weights[n, k]
            if weights[n, k] > weights[n, largest]:
                largest = k
        weights[n, largest] += one - total  # so that a flat image stays flat


@numba.njit(**_options)
def _sum_rows(image, y, begin, end, weights, line):
    """Write the weighted sum of TAPS rows of image (H, 3 W), from row y on, to line.

    begin, end: the range of columns.
    """
    a, b, c, d = weights[0], weights[1], weights[2], weights[3]
    s, t = image[y, begin:end], image[y + 1, begin:end]
    u, v = image[y + 2, begin:end], image[y + 3, begin:end]
    for i in range(end - begin):
        line[i] = a * np.int32(s[i]) + b * np.int32(t[i]) + c * np.int32(u[i]) + d * np.int32(v[i])


@numba.njit(**_options)
def _sum_columns(line, first, weights, flip, out):
    """Write weighted sums of TAPS pixels of line (3 W) to a row (S', 3), mirrored if flip."""
    half, shift = np.int32(1 << (2 * BITS - 1)), np.int32(2 * BITS)
    columns = out.shape[0]
    for column in range(columns):
        # Unsigned indices, because numba tests each signed one for a negative value.
        i = THREE * np.uint64(first[column])
        to = np.uint64(columns - 1 - column if flip else column)
        a, b, c, d = weights[column, 0], weights[column, 1], weights[column, 2], weights[column, 3]
        for channel in range(3):
            j = i + np.uint64(channel)
            total = a * line[j] + b * line[j + THREE] + c * line[j + THREE + THREE]
            total += d * line[j + THREE + THREE + THREE]
            out[to, np.uint64(channel)] = np.uint8((total + half) >> shift)


@numba.njit(**_options)
def _shrink(image, box, flip, buffers, out):
    """Average over areas as OpenCV's INTER_AREA does, to within 1 of 255, but twice as fast."""
    top, left, height, width = box
    rows, columns = out.shape[0], out.shape[1]
    first, weights, line = buffers
    _area_weights(height, rows, first[0], weights[0])
    _area_weights(width, columns, first[1], weights[1])
    for row in range(rows):
        _sum_rows(image, top + first[0, row], 3 * left, 3 * (left + width), weights[0, row], line)
        _sum_columns(line, first[1], weights[1], flip, out[row])


@numba.njit(**_options)
def _fit(image, box, flip, buffers, out):
    """Resize the box (top, left, height, width) of image (H, 3 W) to out (S, S', 3).

    flip: mirror the result. buffers: working memory of _shrink: first (2, L) and weights
    (2, L, TAPS) for an output side of up to L pixels, and line (3 W).
    """
    top, left, height, width = box
    rows, columns = out.shape[0], out.shape[1]
    fits = rows <= height <= MOST_SHRUNK * rows and columns <= width <= MOST_SHRUNK * columns
    if fits and min(height, width) >= TAPS:
        _shrink(image, box, flip, buffers, out)
        return
    h, w = image.shape[0], image.shape[1] // 3
    end, right = top + height, left + width
    _resize(0, image.ctypes.data, h, w, top, end, left, right, out.ctypes.data, rows, columns)
    if flip:
        out[:] = out[:, ::-1].copy()


@numba.njit(**_options)
def decode_samples(stored, rows, boxes, flips, out, status):
    """Decode, crop, resize and mirror samples `rows` (n,) into out, uint8 (n, S, S, 3).

    stored: the mapped file, and the columns mode … sums of Samples. boxes: (n, 4) top, left,
    height, width. status: (n,), receives GOOD, BAD_SUM or BAD_JPEG. An image that is not good, or
    whose row number is negative, is black.
    """
    file, mode, height, width, pointer, size, sums = stored
    widest, largest = np.int64(0), np.int64(0)
    for i in rows:
        if i >= 0:
            h, w = np.int64(height[i]), np.int64(width[i])
            widest, largest = max(widest, w), max(largest, h * w)
    scratch = np.empty(3 * largest, dtype=np.uint8)
    first = np.empty((2, max(out.shape[1], out.shape[2])), dtype=np.int64)
    weights = np.empty((2, first.shape[1], TAPS), dtype=np.int32)
    buffers = first, weights, np.empty(3 * widest, dtype=np.int32)
    for k in range(rows.size):
        i = rows[k]
        out[k] = 0
        status[k] = GOOD
        if i < 0:
            continue
        data = file[pointer[i] : pointer[i] + size[i]]
        h, w = np.int64(height[i]), np.int64(width[i])
        if sums.size > 0 and _byte_sum(data) != sums[i]:
            status[k] = BAD_SUM
            continue
        pixels = data
        if mode[i] == JPEG:
            pixels = scratch[: 3 * h * w]
            place = pixels.ctypes.data
            # The whole image: no offset, scale 1/1, neither cropped nor flipped.
            failed = _imdecode(
                data.ctypes.data, data.size, h, w, place, h, w, 0, 0, 1, 1, False, False
            )
            if failed:
                status[k] = BAD_JPEG
                continue
        _fit(pixels.reshape(h, 3 * w), boxes[k], flips[k], buffers, out[k])
