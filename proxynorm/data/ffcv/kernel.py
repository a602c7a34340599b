"""The decoding loop of the FFCV backend, compiled by numba.

native.decoder imports it, once it has registered the symbols of FFCV's library.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from proxynorm.data.ffcv.beton import JPEG, WEIGHT, WEIGHT_TAIL
from proxynorm.data.ffcv.native import BAD_JPEG, BAD_SUM, GOOD

_u32, _i64, _pointer = types.uint32, types.int64, types.uintp
_imdecode = types.ExternalFunction(
    "proxynorm_ffcv_imdecode",
    types.int32(
        *(_pointer, types.uint64, _u32, _u32, _pointer), *[_u32] * 6, types.boolean, types.boolean
    ),
)
_resize = types.ExternalFunction("proxynorm_ffcv_resize", types.void(*([_i64] * 11)))
# Precision of the shares of pixels in _shrink: 2^8 values times two shares stay below 2^31.
BITS = 11
# Four pixels a side cover an area of three pixels wherever it begins.
MOST_SHRUNK = 3
THREE = np.uint64(3)
# Rows of a block of a JPEG whose chroma is stored at half the height.
BLOCK_ROWS = 16
# Markers of a JPEG's header: a frame coded from top to bottom in one go; frames coded otherwise;
# the first scan. These have no segment: those below FIRST_SEGMENT, restarts, start and end.
SEQUENTIAL, LAST_FRAME, NOT_FRAMES, SCAN = (0xC0, 0xC1), 0xCF, (0xC4, 0xC8, 0xCC), 0xDA
FIRST_SEGMENT, FIRST_ALONE, LAST_ALONE = 0xC0, 0xD0, 0xD9
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
def _height_place(data, height, width):
    """Return where a JPEG's header gives its height, if a single scan codes its rows in order.

    0 for any other JPEG, for a header that says another size, and for one of more than segments.
    """
    place, components, at = 0, 0, 2
    while at + 9 < data.size and data[at] == 0xFF:
        marker, length = data[at + 1], _word(data, at + 2)
        alone = marker < FIRST_SEGMENT or FIRST_ALONE <= marker <= LAST_ALONE
        if alone or marker == 0xFF or length < 2:
            return 0
        if marker in SEQUENTIAL:
            if place != 0 or _word(data, at + 5) != height or _word(data, at + 7) != width:
                return 0
            place, components = at + 5, data[at + 9]
        elif SEQUENTIAL[-1] < marker <= LAST_FRAME and marker not in NOT_FRAMES:
            return 0
        elif marker == SCAN:
            return place if data[at + 4] == components else 0
        at += 2 + length
    return 0


@numba.njit(**_options)
def _word(data, at):
    """Return the number in two bytes, the higher first."""
    return 256 * np.int64(data[at]) + np.int64(data[at + 1])


@numba.njit(**_options)
def _cut(data, height, width, rows, copy):
    """Copy a JPEG with a header that ends it after `rows` rows; return False if it cannot."""
    place = _height_place(data, height, width)
    if place == 0:
        return False
    copy[: data.size] = data
    copy[place], copy[place + 1] = rows >> 8, rows & 255
    return True


@numba.njit(**_options)
def _decode(data, height, width, bottom, known, copy, pixels):
    """Decode the JPEG's rows down to `bottom`, or more, into pixels (3 H W,).

    Returns whether it could be decoded. known: the checksum matches, so these bytes decoded when
    they were written. Then decoding stops below the crop: two rows below, as those above take a
    share of their chroma. The decoder complains about the bytes left over, which is no damage.
    """
    rows = min(height, BLOCK_ROWS * ((bottom + 2 + BLOCK_ROWS - 1) // BLOCK_ROWS))
    cut = known and rows < height and _cut(data, height, width, rows, copy)
    source = copy.ctypes.data if cut else data.ctypes.data
    lines = rows if cut else height
    status = _imdecode(
        source, data.size, lines, width, pixels.ctypes.data, lines, width, 0, 0, 1, 1, False, False
    )
    return cut or status == 0


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
def _area_weights(length, size, taps, first, weights):
    """Compute the shares of `length` pixels in each of `size` <= length.

    Pixel n takes weights[n, :taps] / 2^BITS of those from first[n] on.
    """
    scale = length / size
    one = np.int32(1 << BITS)
    for n in range(size):
        start, end = n * scale, min((n + 1) * scale, np.float64(length))
        low = min(np.int64(start), length - taps)
        first[n] = low
        total, largest = np.int32(0), 0
        for k in range(taps):
            covered = max(0.0, min(end, low + k + 1.0) - max(start, low + k + 0.0))
            weights[n, k] = np.int32(np.rint(covered / scale * one))
            total += weights[n, k]
            if weights[n, k] > weights[n, largest]:
                largest = k
        weights[n, largest] += one - total


@numba.njit(**_options)
def _taps(length, size):
    """Return how many of `length` pixels make one of `size`: three, up to a factor of two."""
    return 3 if length <= 2 * size else 4


@numba.njit(**_options)
def _down(image, y, begin, end, weights, taps, line):
    """Sum `taps` rows of image (H, 3 W) from y on, weighted, columns begin to end, into line."""
    a, b, c, d = weights[0], weights[1], weights[2], weights[3]
    s, t, u = image[y, begin:end], image[y + 1, begin:end], image[y + 2, begin:end]
    if taps == 3:
        for i in range(end - begin):
            line[i] = a * np.int32(s[i]) + b * np.int32(t[i]) + c * np.int32(u[i])
    else:
        v = image[y + 3, begin:end]
        for i in range(end - begin):
            line[i] = (
                a * np.int32(s[i]) + b * np.int32(t[i]) + c * np.int32(u[i]) + d * np.int32(v[i])
            )


@numba.njit(**_options)
def _across(line, first, weights, taps, flip, out):
    """Sum `taps` pixels of line (3 W) each, weighted, into a row (S', 3), mirrored if flip."""
    half, shift = np.int32(1 << (2 * BITS - 1)), np.int32(2 * BITS)
    columns = out.shape[0]
    for column in range(columns):
        # Unsigned places: numba looks at each signed one for being counted from the end.
        i = THREE * np.uint64(first[column])
        to = np.uint64(columns - 1 - column if flip else column)
        a, b, c, d = weights[column, 0], weights[column, 1], weights[column, 2], weights[column, 3]
        for channel in range(3):
            j = i + np.uint64(channel)
            total = a * line[j] + b * line[j + THREE] + c * line[j + THREE + THREE]
            if taps == 4:
                total += d * line[j + THREE + THREE + THREE]
            out[to, np.uint64(channel)] = np.uint8((total + half) >> shift)


@numba.njit(**_options)
def _shrink(image, box, flip, first, weights, line, out):
    """Average over areas as OpenCV's INTER_AREA does, to within 1 of 255, but twice as fast.

    image (H, 3 W); box: top, left, height, width, at least out's sides and at most MOST_SHRUNK
    times them; out: (rows, columns, 3). Room for the shares, with S the longer side of out: first
    (2, S), weights (2, S, 4); for a row: line (3 W).
    """
    top, left, height, width = box
    rows, columns = out.shape[0], out.shape[1]
    tall, wide = _taps(height, rows), _taps(width, columns)
    _area_weights(height, rows, tall, first[0], weights[0])
    _area_weights(width, columns, wide, first[1], weights[1])
    for row in range(rows):
        _down(image, top + first[0, row], 3 * left, 3 * (left + width), weights[0, row], tall, line)
        _across(line, first[1], weights[1], wide, flip, out[row])


@numba.njit(**_options)
def _shrinkable(box, out):
    """Return whether _shrink serves: its four pixels a side cover what makes one."""
    height, width = box[2], box[3]
    rows, columns = out.shape[0], out.shape[1]
    fits = rows <= height <= MOST_SHRUNK * rows and columns <= width <= MOST_SHRUNK * columns
    return fits and min(height, width) >= 4


@numba.njit(**_options)
def _fit(image, box, flip, first, weights, line, out):
    """Resize the box of image (H, 3 W) to out (S, S', 3), mirrored if flip."""
    if _shrinkable(box, out):
        _shrink(image, box, flip, first, weights, line, out)
        return
    top, left, height, width = box
    h, w = image.shape[0], image.shape[1] // 3
    end, right = top + height, left + width
    rows, columns = out.shape[0], out.shape[1]
    _resize(0, image.ctypes.data, h, w, top, end, left, right, out.ctypes.data, rows, columns)
    if flip:
        _mirror(out)


@numba.njit(**_options)
def decode_samples(stored, rows, boxes, flips, scratch, out, status):
    """Decode, crop, resize and mirror samples `rows` (n,) into out, uint8 (n, S, S, C).

    stored: the mapped file, and the columns mode … sums of Samples. boxes: (n, 4) top, left,
    height, width. scratch: room for the largest image. status: (n,) GOOD, BAD_SUM or BAD_JPEG; a
    row that is not good is black, and so is one whose row number is negative.
    """
    file, mode, height, width, pointer, size, sums = stored
    first = np.empty((2, max(out.shape[1], out.shape[2])), dtype=np.int64)
    weights = np.empty((2, first.shape[1], 4), dtype=np.int32)
    widest, longest = 1, 0
    for i in rows:
        if i >= 0:
            widest = max(widest, np.int64(width[i]))
            longest = max(longest, np.int64(size[i]))
    line = np.empty(3 * widest, dtype=np.int32)
    copy = np.empty(longest, dtype=np.uint8)
    known = sums.size > 0
    for k in range(rows.size):
        i = rows[k]
        status[k] = GOOD
        if i < 0:
            out[k] = 0
            continue
        data = file[pointer[i] : pointer[i] + size[i]]
        h, w = np.int64(height[i]), np.int64(width[i])
        bottom = boxes[k, 0] + boxes[k, 2]
        if known and _byte_sum(data) != sums[i]:
            status[k] = BAD_SUM
        elif mode[i] == JPEG and not _decode(data, h, w, bottom, known, copy, scratch):
            status[k] = BAD_JPEG
        if status[k] != GOOD:
            out[k] = 0
        elif out.shape[3] == 1:
            out[k] = data.reshape(h, w, 1)
            if flips[k]:
                _mirror(out[k])
        elif mode[i] == JPEG:
            image = scratch[: 3 * h * w].reshape(h, 3 * w)
            _fit(image, boxes[k], flips[k], first, weights, line, out[k])
        else:
            _fit(data.reshape(h, 3 * w), boxes[k], flips[k], first, weights, line, out[k])
