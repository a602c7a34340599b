"""Files made on the fly: one maker at a time; the others wait and reuse."""

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
    """Return the given folder, $PROXYNORM_CACHE, or ~/.cache/proxynorm; made if missing.

    Raises FileError if it cannot be made.
    """
    folder = Path(given or os.environ.get("PROXYNORM_CACHE") or "~/.cache/proxynorm").expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached_beton(
    given: str | None, stem: str, signature: str, make: Callable[[Path], Samples]
) -> Samples:
    """Return the .beton file that make(path) writes; made if it is missing or damaged.

    given: see cache_folder; signature: all that the file depends on; another one is another file.
    """
    folder = cache_folder(given)
    # File names need not be UTF-8.
    digest = hashlib.sha256(signature.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = folder / f"{stem}-{digest}.beton"
    with writing(path), locked(path.with_suffix(".lock")):
        if path.is_file():
            with suppress(DataError):
                samples = read_beton(path)
                if samples.manifest:
                    return samples
            path.unlink()
        return make(path)
