"""Loads FFCV's shared library and the decoding loop that calls it.

The ffcv package is not imported: that takes seconds, sets torch's thread count to one, and compiles
its pipelines anew in each process. numba compiles our loop once and caches it on disk.
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
    # We decode images in parallel; OpenCV's own threads would only compete with ours.
    set_threads = getattr(library, "_ZN2cv13setNumThreadsEi", None)
    if set_threads is not None:
        set_threads(1)
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    return library


def ffcv_available() -> bool:
    """Return whether .beton files can be decoded: FFCV's library loads and numba is installed."""
    try:
        ffcv_library()
    except ConfigError:
        return False
    return importlib.util.find_spec("numba") is not None


@cache
def decoder():
    """Return the compiled loop, kernel.decode_samples."""
    from llvmlite import binding

    library = ffcv_library()
    for name in ("imdecode", "resize"):
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        binding.add_symbol(f"proxynorm_ffcv_{name}", address)
    try:
        from proxynorm.data.ffcv.kernel import decode_samples
    except RuntimeError:
        # numba can write its cache neither to the package's folder nor to the home folder.
        import numba

        numba.config.CACHE_DIR = str(Path(tempfile.gettempdir()) / f"proxynorm-numba-{os.getuid()}")
        from proxynorm.data.ffcv.kernel import decode_samples
    return decode_samples
