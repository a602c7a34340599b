"""Loads FFCV's compiled decoder, and the loop around it that checks every status.

Importing the ffcv package takes seconds and sets torch's thread count to one, and its pipelines are
compiled anew in each process. So its shared library is loaded directly here, and numba compiles the
loop once and keeps it on disk.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path

from proxynorm.data.ffcv.beton import CHANGED
from proxynorm.errors import ConfigError

GOOD, BAD_SUM, BAD_JPEG = 0, 1, 2
REASONS = {BAD_SUM: CHANGED, BAD_JPEG: "its JPEG data cannot be decoded"}
INSTALL = (
    "install it with: apt-get install libopencv-dev libturbojpeg0-dev pkg-config && pip install "
    "ffcv"
)


@cache
def ffcv_library() -> ctypes.CDLL:
    """Load FFCV's shared library. Raises ConfigError if it, or a library it needs, is missing."""
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec else ()
    found = [file for folder in folders for file in Path(folder).glob("_libffcv*")]
    if not found:
        raise ConfigError(f"loader.name=ffcv: FFCV is not installed; {INSTALL}")
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise ConfigError(f"loader.name=ffcv: FFCV does not load ({error}); {INSTALL}") from None
    # Our threads share out the images; OpenCV's own pool would only compete with them.
    set_threads = getattr(library, "_ZN2cv13setNumThreadsEi", None)
    if set_threads is not None:
        set_threads(1)
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    return library


def ffcv_available() -> bool:
    """Return whether .beton files can be read here: FFCV's library loads, numba is installed."""
    try:
        ffcv_library()
    except ConfigError:
        return False
    return importlib.util.find_spec("numba") is not None


@cache
def decoder():
    """Return the compiled loop, kernel.decode_samples; a second process loads it from the disk."""
    from llvmlite import binding

    library = ffcv_library()
    for name in ("imdecode", "resize"):
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        binding.add_symbol(f"proxynorm_ffcv_{name}", address)
    try:
        from proxynorm.data.ffcv.kernel import decode_samples
    except RuntimeError:
        # Neither the package's folder nor the home can be written: numba's cache goes elsewhere.
        import numba

        numba.config.CACHE_DIR = str(Path(tempfile.gettempdir()) / f"proxynorm-numba-{os.getuid()}")
        from proxynorm.data.ffcv.kernel import decode_samples
    return decode_samples
