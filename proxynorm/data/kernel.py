"""The decoding loop of the FFCV backend, compiled by numba. native.decoder imports it, after naming its symbols."""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from proxynorm.data.beton import JPEG, WEIGHT, WEIGHT_TAIL
from proxynorm.data.native import BAD_JPEG, BAD_SUM, GOOD

_u32, _i64, _pointer = types.uint32, types.int64, types.uintp
_imdecode = types.ExternalFunction(
    "proxynorm_ffcv_imdecode",
    types.int32(
        _pointer, types.uint64, _u32, _u32, _pointer, _u32, _u32, _u32, _u32, _u32, _u32, types.boolean, types.boolean
    ),
)
_resize = types.ExternalFunction("proxynorm_ffcv_resize", types.void(*([_i64] * 11)))
_options = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}


@numba.njit(**_options)
def _byte_sum(data):
    """beton.byte_sum, without a copy."""
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
def _mirror(image):
    """Reverse the columns of (H, W, C) in place."""
    height, width, channels = image.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(channels):
                left = image[y, x, c]
                image[y, x, c] = image[y, width - 1 - x, c]
                image[y, width - 1 - x, c] = left


@numba.njit(**_options)
def decode_samples(file, rows, mode, height, width, pointer, size, sums, boxes, flips, scratch, out, status):
    """Decode, crop, resize and mirror samples `rows` (n,) of the mapped `file` into out, uint8 (n, S, S, C).

    mode … sums: the columns of Samples. boxes: (n, 4) top, left, height, width. scratch: room for the largest image.
    status: (n,) GOOD, BAD_SUM or BAD_JPEG; a row that is not good is black, and so is one whose row number is negative.
    """
    for k in range(rows.size):
        i = rows[k]
        status[k] = GOOD
        if i < 0:
            out[k] = 0
            continue
        data = file[pointer[i] : pointer[i] + size[i]]
        h, w = np.int64(height[i]), np.int64(width[i])
        if sums.size > 0 and _byte_sum(data) != sums[i]:
            status[k] = BAD_SUM
        source = data.ctypes.data
        if status[k] == GOOD and mode[i] == JPEG:
            source = scratch.ctypes.data
            if _imdecode(data.ctypes.data, size[i], h, w, source, h, w, 0, 0, 1, 1, False, False) != 0:
                status[k] = BAD_JPEG
        if status[k] != GOOD:
            out[k] = 0
            continue
        top, left, box_height, box_width = boxes[k]
        if out.shape[3] == 3:
            destination = out[k].ctypes.data
            _resize(
                0, source, h, w, top, top + box_height, left, left + box_width, destination, out.shape[1], out.shape[2]
            )
        else:
            out[k] = data.reshape(h, w, 1)
        if flips[k]:
            _mirror(out[k])
