"""The cache of converted data sets. One process makes a file; others wait and reuse it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.errors import DataError
from proxynorm.files import locked, writing


def cache_folder(given: str | None) -> Path:
    """Return the given folder, $PROXYNORM_CACHE, or ~/.cache/proxynorm; created if missing.

    Raises FileError if it cannot be created.
    """
    folder = Path(given or os.environ.get("PROXYNORM_CACHE") or "~/.cache/proxynorm").expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached_beton(
    given: str | None, stem: str, signature: str, make: Callable[[Path], Samples]
) -> Samples:
    """Return the cached .beton file. If it is missing or damaged, make(path) writes it.

    given: see cache_folder; signature: everything that the file depends on.
    """
    folder = cache_folder(given)
    # File names need not be UTF-8.
    digest = hashlib.sha256(signature.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = folder / f"{stem}-{digest}.beton"
    with writing(path), locked(path.with_suffix(".lock")):
        with suppress(DataError):  # missing or damaged
            samples = read_beton(path)
            if samples.manifest:
                return samples
        path.unlink(missing_ok=True)  # makes room for the new file
        return make(path)
