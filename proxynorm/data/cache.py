"""Files made on the fly: one folder, one maker at a time, the others wait and reuse."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.errors import DataError


def cache_folder(given: str | None) -> Path:
    """The folder for files made on the fly: the given one, $PROXYNORM_CACHE, or ~/.cache/proxynorm;
    made if missing."""
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
    """The .beton file that make(path) writes for this signature (what it is made from), made if
    missing or damaged."""
    path = folder / f"{stem}-{hashlib.sha256(signature.encode()).hexdigest()[:16]}.beton"
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
    """Hold a lock that ends with the process, however the process ends."""
    with ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(
                f"{path.parent}: cannot be written or locked ({error.strerror}); set data.cache "
                f"to another folder"
            ) from None
        yield
