"""Atomic and durable file writes, lock files, and the cache folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from proxynorm.errors import FileError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into a FileError."""
    try:
        yield
    except OSError as error:
        remedy = "; make room and run again" if error.errno in DISK_FULL else ""
        raise FileError(f"cannot write {path}: {error.strerror or error}{remedy}") from error


def cache_folder(given: str | None) -> Path:
    """Return the given folder, $PROXYNORM_CACHE, or ~/.cache/proxynorm; created if missing.

    Raises FileError if it cannot be created.
    """
    folder = Path(given or os.environ.get("PROXYNORM_CACHE") or "~/.cache/proxynorm").expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(
    path: Path, write: Callable[[BinaryIO], object], before_rename: Callable[[], None] | None = None
) -> None:
    """Call `write` on a temporary file, fsync it and rename it to `path`.

    Raises FileError if it cannot be written; `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            if before_rename:
                before_rename()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the text file `path` atomically."""
    write_atomic(path, lambda stream: stream.write(text.encode()))


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None in nested values."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with indented JSON, atomically; NaN and infinities become null."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock file; the system releases it if the process dies.

    While another process holds it: wait, or raise a FileError that says `busy`.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise FileError(busy) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
