"""Reads an image file, checks it, converts it to upright RGB and encodes it for storage.

A file that cannot be used raises BadImage, whatever its fault; callers then apply the policy
data.on_bad. A damaged file can raise any exception in a decoder, so all of them are caught.
"""

from __future__ import annotations

import ctypes
import io
import os
import re
import stat
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from proxynorm.cli import check_fields, first_line, number
from proxynorm.data.ffcv.beton import JPEG, PAGE_SIZE, RAW
from proxynorm.data.ffcv.native import ffcv_available, ffcv_library

Image.init()  # registers the plugins
# Pillow's other formats are not photographs (icons, PDF) or start other programs (EPS).
KNOWN = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
FORMATS = [name for name in KNOWN if name in Image.OPEN]
EXTENSIONS = tuple(
    sorted(end for end, name in Image.registered_extensions().items() if name in FORMATS)
)
# Pillow warns of damaged files. The filter is global because threads share one list of filters.
warnings.filterwarnings("ignore", module="PIL")
ALWAYS_RAW = 64 * 64  # pixels; images up to this size are never stored as JPEG
LONGEST_SIDE = 65_535  # a .beton file has 16 bits for it
# Cameras pad the end of the data with a few bytes. More than that means that data was skipped.
STRAY_BYTES = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
STRAY_BYTES_ALLOWED = 16
TJ_RGB, TJ_CMYK = 0, 11  # libturbojpeg's pixel formats


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, without the file's name."""


class ImageRef(NamedTuple):
    """A reference to an image's bytes: a file, or `size` bytes at `offset` of an archive.

    name: printable, for messages.
    """

    path: str
    name: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class StorageOptions:
    """How images are stored in a .beton file. Raises ConfigError for impossible values.

    max_side: images with a longer side are shrunk to it, pixels; None: never. jpeg_quality: 1..100.
    jpeg_probability: the share of images stored as JPEG. The others are raw (faster, larger), as
    are all images of at most 64x64 pixels.
    """

    max_side: int | None = number(500, "from 1 to 65535")
    jpeg_quality: int = number(90, "from 1 to 100")
    jpeg_probability: float = number(1.0, "from 0 to 1")

    def __post_init__(self) -> None:
        check_fields(self)


class Stored(NamedTuple):
    """An image in its stored form; height and width in pixels, mode JPEG or RAW."""

    data: bytes
    height: int
    width: int
    mode: int


def read_bytes(ref: ImageRef) -> bytes:
    """Return the image's bytes. Raises BadImage if they are missing or incomplete."""
    try:
        # Opening a named pipe would wait for its writer forever.
        if not stat.S_ISREG(os.stat(ref.path).st_mode):
            raise BadImage("is not a regular file")
        with open(ref.path, "rb") as file:
            file.seek(ref.offset)
            data = file.read() if ref.size is None else file.read(ref.size)
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from None
    if not data:
        raise BadImage("is empty")
    if ref.size is not None and len(data) < ref.size:
        raise BadImage("is cut off by the end of its archive")
    return data


def load_rgb(ref: ImageRef, strict: bool = False) -> Image.Image:
    """Decode an image to RGB, upright by its EXIF tag. The content alone decides the format.

    strict: also refuse JPEG data that decodes with warnings (needs FFCV's library). Raises BadImage
    for any fault.
    """
    data = read_bytes(ref)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if strict and image.format in ("JPEG", "MPO"):  # MPO: a JPEG followed by another one
            _check_jpeg(data, image)
        image.load()
        with suppress(Exception):  # turns pixels, then edits the EXIF block, which may be damaged
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("is not an image of a known format") from None
    except Exception as error:
        raise BadImage(f"cannot be decoded ({first_line(error)})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to RGB. Raises BadImage if its range is unknown."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65_535:
            raise BadImage("holds 32-bit pixels of unknown range; convert it to 8 or 16 bits")
        # Scale 16-bit grey, which convert() would clip.
        image = Image.fromarray((values / 257).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("holds floating-point pixels of unknown range; convert it to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_jpeg(data: bytes, image: Image.Image) -> None:
    """Raise BadImage for JPEG data that decodes with warnings, if FFCV is installed.

    FFCV's library includes libturbojpeg. Decoding at an eighth of the size is fast and still reads
    every coefficient.
    """
    if not ffcv_available():
        return
    library = ffcv_library()
    width, height = (-(-side // 8) for side in image.size)
    kind = TJ_CMYK if image.mode == "CMYK" else TJ_RGB
    pixels = ctypes.create_string_buffer(width * height * 4)
    length = ctypes.c_ulong(len(data))
    # A new decompressor for each image: a damaged header would leave it in the wrong state.
    handle = ctypes.c_void_p(library.tjInitDecompress())
    try:
        if library.tjDecompress2(handle, data, length, pixels, width, 0, height, kind, 0) != 0:
            reason = (library.tjGetErrorStr2(handle) or b"unknown error").decode("ascii", "replace")
            stray = STRAY_BYTES.fullmatch(reason)
            if stray is None or int(stray[1]) > STRAY_BYTES_ALLOWED:
                raise BadImage(f"has damaged JPEG data ({reason})")
    finally:
        library.tjDestroy(handle)


def store(ref: ImageRef, options: StorageOptions, draw: float) -> Stored:
    """Check an image and encode it. draw, in [0, 1), decides between JPEG and raw.

    Raises BadImage for a file that cannot be used.
    """
    image = load_rgb(ref, strict=True)
    longest = max(image.size)
    if options.max_side is not None and longest > options.max_side:
        size = tuple(max(1, round(side * options.max_side / longest)) for side in image.size)
        image = image.resize(size, Image.Resampling.BOX)
    width, height = image.size
    data, mode = image.tobytes(), RAW
    if len(data) > PAGE_SIZE or (width * height > ALWAYS_RAW and draw < options.jpeg_probability):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=options.jpeg_quality)
        data, mode = buffer.getvalue(), JPEG
    if len(data) > PAGE_SIZE or max(width, height) > LONGEST_SIDE:
        raise BadImage("is too large for a .beton file; use max_side")
    return Stored(data, height, width, mode)
