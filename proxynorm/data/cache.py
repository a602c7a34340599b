"""Files made on the fly: one maker at a time; the others wait and reuse."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.errors import DataError
from proxynorm.files import locked


def cache_folder(given: str | None) -> Path:
    """Return the given folder, $PROXYNORM_CACHE, or ~/.cache/proxynorm; made if missing."""
    default = (
        os.environ.get("PROXYNORM_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "proxynorm"
    )
    folder = Path(given or default).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be made ({error.strerror}); set data.cache to another folder"
        ) from None
    return folder


def cached_beton(folder: Path, stem: str, signature: str, make: Callable[[Path], None]) -> Samples:
    """Return the .beton file that make(path) writes; made if it is missing or damaged.

    signature: all that the file depends on; another signature is another file.
    """
    # File names need not be UTF-8.
    digest = hashlib.sha256(signature.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = folder / f"{stem}-{digest}.beton"
    try:
        with locked(path.with_suffix(".lock")):
            if path.is_file():
                with suppress(DataError):
                    samples = read_beton(path)
                    if samples.manifest:
                        return samples
                path.unlink()
            make(path)
            return read_beton(path)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written or locked ({error.strerror}); set data.cache to another "
            "folder"
        ) from None
