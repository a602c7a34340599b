"""Files made on the fly: one folder, one maker at a time; the others wait and reuse."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.errors import DataError


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
    with _lock(path.with_suffix(".lock")):
        if path.is_file():
            with suppress(DataError):
                samples = read_beton(path)
                if samples.manifest:
                    return samples
            path.unlink()
        make(path)
        return read_beton(path)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for the lock file and hold it; the system releases it if the process dies."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that makes {path.stem}.beton", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot be written or locked ({error.strerror}); set data.cache to "
            "another folder"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
