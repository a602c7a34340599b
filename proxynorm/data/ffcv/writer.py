"""Writing a .beton file: whole or not at all, and read back before it gets its name.

FFCV's own writer is not used: it hangs when its source raises, and its output depends on the
number of workers.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from proxynorm.data.ffcv.beton import (
    ALLOCATION,
    CHANGED,
    DIGEST,
    FIELD,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    PAGE_SIZE,
    RECORD,
    VERSION,
    byte_sum,
    changed_images,
    digest,
    manifest_path,
    read_beton,
    sums_path,
)
from proxynorm.errors import DataError
from proxynorm.files import FULL, sync_folder, write_atomic, write_text


class BetonWriter:
    """Writes one .beton file under a temporary name; use new_beton.

    capacity: the most samples that will be added.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self.path = Path(path)
        self.fields = np.zeros(2, dtype=FIELD)
        self.fields["type_id"] = IMAGE_FIELD, INT_FIELD
        for row, name in zip(self.fields, (b"image", b"label")):
            row["name"][: len(name)] = np.frombuffer(name, dtype="<u1")
        self.records = np.zeros(capacity, dtype=RECORD)
        self.allocations = np.zeros(capacity, dtype=ALLOCATION)
        self.sums = np.zeros(capacity, dtype=np.uint64)
        self.count = 0
        self.file: BinaryIO | None = None

    def open(self) -> None:
        """Open the file. Raises DataError if another process is writing it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = _open_alone(self.path)
        self._to_next_page(HEADER.itemsize + self.fields.nbytes + self.records.nbytes)

    def add(self, data: np.ndarray, target: int, height: int, width: int, mode: int) -> None:
        """Append a sample: its stored bytes (uint8, 1-D), class, sides in pixels, JPEG or RAW."""
        pointer = self._place(len(data))
        self.file.write(data)
        self.records[self.count] = (mode, width, height, pointer), target
        self.allocations[self.count] = (self.count, pointer, len(data))
        self.sums[self.count] = byte_sum(data)
        self.count += 1

    def _place(self, size: int) -> int:
        """Return where a sample goes: FFCV's page cache requires that it crosses no page border."""
        position = self.file.tell()
        if position // PAGE_SIZE == (position + size - 1) // PAGE_SIZE:
            return position
        return self._to_next_page(position)

    def _to_next_page(self, position: int) -> int:
        return self.file.seek(-(-position // PAGE_SIZE) * PAGE_SIZE)

    def close(self, manifest: dict) -> None:
        """Finish the file, read it back, and give it and its companions their names.

        Raises DataError if other bytes are on the disk.
        """
        # FFCV's page cache reads whole pages: fill the last one.
        table = self._to_next_page(self.file.tell())
        self.file.write(self.allocations[: self.count].tobytes())
        header = np.array((VERSION, 2, PAGE_SIZE, self.count, table), dtype=HEADER)
        head = header.tobytes() + self.fields.tobytes() + self.records[: self.count].tobytes()
        self.file.seek(0)
        self.file.write(head)
        _flush(self.file)
        sums, temporary = self.sums[: self.count], _hidden(self.path)
        if changed := changed_images(replace(read_beton(temporary), sums=sums)):
            raise DataError(
                f"{next(iter(changed))}: {CHANGED}; {len(changed)} of {self.count} images are "
                "damaged, write the file again"
            )
        contents = {**manifest, "bytes": temporary.stat().st_size}
        contents[DIGEST] = digest(head, sums, contents)
        # If this is interrupted, the digest tells an old file from the new one's companions.
        write_atomic(sums_path(self.path), lambda file: np.save(file, sums))
        write_text(manifest_path(self.path), json.dumps(contents, indent=1) + "\n")
        os.replace(temporary, self.path)
        sync_folder(self.path.parent)
        self.file.close()  # and with it the lock

    def discard(self) -> None:
        """Remove the unfinished file, unless it is another process's."""
        if self.file is not None:
            _hidden(self.path).unlink(missing_ok=True)
            with suppress(OSError):  # a full disk refuses what is still buffered
                self.file.close()


def _hidden(path: Path) -> Path:
    """Return the name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


def _open_alone(path: Path) -> BinaryIO:
    """Open the temporary file of `path`, empty, and locked while it is open: one writer at a time.

    A killed writer's file is overwritten: its lock ended with it. DataError if another process is
    writing.
    """
    while True:
        file = os.fdopen(os.open(_hidden(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(
                f"{path}: another process is writing it; wait for it, or give another name"
            ) from None
        except OSError:
            pass  # a file system without locks; reading back finds what two writers would do
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(_hidden(path))):
                file.truncate(0)
                return file
        # Between opening and locking the other writer finished, and this is now its file.
        file.close()


@contextmanager
def new_beton(path: Path, capacity: int) -> Iterator[BetonWriter]:
    """Give a BetonWriter to add to and to close; whatever goes wrong, no unfinished file stays.

    Raises DataError if the folder cannot be written or the disk is full.
    """
    writer = BetonWriter(path, capacity)
    try:
        writer.open()
        yield writer
    except BaseException as error:
        writer.discard()
        if not isinstance(error, OSError):
            raise
        remedy = "make room, or " if error.errno in FULL else ""
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); {remedy}choose another folder"
        ) from None


def _flush(file: BinaryIO) -> None:
    """Bring the file to the disk, and out of the page cache where the system allows it.

    So reading it back tests the disk.
    """
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
