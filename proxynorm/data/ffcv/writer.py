"""Writing a .beton file: whole or not at all, and read back before it gets its name.

FFCV's own writer is not used: it hangs when its source raises, and its output depends on the
number of workers.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from proxynorm.data.ffcv.beton import (
    ALLOCATION,
    ARRAY_ARGUMENTS,
    ARRAY_FIELD,
    DIGEST,
    FIELD,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    PAGE_SIZE,
    VERSION,
    Samples,
    byte_sum,
    digest,
    manifest_path,
    metadata_type,
    read_beton,
    sums_path,
)
from proxynorm.errors import DataError
from proxynorm.files import FULL, sync_folder


def field_descriptors(shape: tuple[int, int] | None) -> np.ndarray:
    """Return FFCV's description of the fields "image" and "label".

    shape: (height, width) of grey images, None for images in colour.
    """
    fields = np.zeros(2, dtype=FIELD)
    for row, name in zip(fields, (b"image", b"label")):
        row["name"][: len(name)] = np.frombuffer(name, dtype="<u1")
    fields["type_id"] = (ARRAY_FIELD if shape else IMAGE_FIELD), INT_FIELD
    if shape:
        element = json.dumps(np.dtype("u1").descr).encode()
        arguments = np.zeros(1, dtype=ARRAY_ARGUMENTS)
        arguments["shape"][0, :2] = shape
        arguments["type_length"] = len(element)
        packed = arguments.tobytes() + element
        fields[0]["arguments"][: len(packed)] = np.frombuffer(packed, dtype="<u1")
    return fields


class BetonWriter:
    """Writes one .beton file under a temporary name; use new_beton.

    capacity: the most samples that will be added; shape: (height, width) of every image, for grey
    images only. Raises DataError if another process is writing the same file.
    """

    def __init__(self, path: Path, capacity: int, shape: tuple[int, int] | None = None) -> None:
        self.path = Path(path)
        self.grey = shape is not None
        self.fields = field_descriptors(shape)
        self.records = np.zeros(capacity, dtype=metadata_type(1 if self.grey else 3))
        self.allocations = np.zeros(capacity, dtype=ALLOCATION)
        self.sums = np.zeros(capacity, dtype=np.uint64)
        self.count = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = _open_alone(self.path)
        self._to_next_page(HEADER.itemsize + self.fields.nbytes + self.records.nbytes)

    def add(self, data: np.ndarray, target: int, height: int, width: int, mode: int) -> None:
        """Append a sample: its stored bytes (uint8, 1-D), class, sides in pixels, JPEG or RAW."""
        pointer = self._place(len(data))
        self.file.write(data)
        image = pointer if self.grey else (mode, width, height, pointer)
        self.records[self.count] = (image, target)
        self.allocations[self.count] = (self.count, pointer, len(data))
        self.sums[self.count] = byte_sum(data)
        self.count += 1

    def _place(self, size: int) -> int:
        """Return where a sample of this size goes.

        FFCV's page cache requires that a sample never crosses a page border.
        """
        if size > PAGE_SIZE:
            raise DataError(
                f"{self.path}: an image of {size} stored bytes exceeds a page of {PAGE_SIZE}; use "
                "max_side"
            )
        position = self.file.tell()
        if position // PAGE_SIZE == (position + size - 1) // PAGE_SIZE:
            return position
        return self._to_next_page(position)

    def _to_next_page(self, position: int) -> int:
        return self.file.seek(-(-position // PAGE_SIZE) * PAGE_SIZE)

    def close(self, manifest: dict, verify: Callable[[Samples], None]) -> None:
        """Finish the file, have it read back by verify(samples), and put it and its companions.

        verify raises DataError if what is on the disk is not what was added. DataError also if
        nothing was added.
        """
        if self.count == 0:
            raise DataError(f"{self.path}: not one usable image to write")
        # FFCV's page cache reads whole pages: fill the last one.
        table = self._to_next_page(self.file.tell())
        self.file.write(self.allocations[: self.count].tobytes())
        header = np.array((VERSION, 2, PAGE_SIZE, self.count, table), dtype=HEADER)
        head = header.tobytes() + self.fields.tobytes() + self.records[: self.count].tobytes()
        self.file.seek(0)
        self.file.write(head)
        _flush(self.file)
        sums, temporary = self.sums[: self.count], _hidden(self.path)
        verify(replace(read_beton(temporary), sums=sums))
        contents = {**manifest, "bytes": temporary.stat().st_size}
        contents[DIGEST] = digest(head, sums, contents)
        with open(_hidden(sums_path(self.path)), "wb") as file:
            np.save(file, sums)
            _flush(file)
        with open(_hidden(manifest_path(self.path)), "wb") as file:
            file.write(json.dumps(contents, indent=1).encode() + b"\n")
            _flush(file)
        # Until the new file is whole: no file rather than an old one beside the new one's manifest.
        self.path.unlink(missing_ok=True)
        for path in (sums_path(self.path), manifest_path(self.path), self.path):
            os.replace(_hidden(path), path)
        sync_folder(self.path.parent)
        self.file.close()  # and with it the lock

    def discard(self) -> None:
        """Remove the unfinished file."""
        for path in (self.path, sums_path(self.path), manifest_path(self.path)):
            _hidden(path).unlink(missing_ok=True)
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
def new_beton(
    path: Path, capacity: int, shape: tuple[int, int] | None = None
) -> Iterator[BetonWriter]:
    """Give a BetonWriter to add to and to close; whatever goes wrong, no unfinished file stays.

    Raises DataError if the folder cannot be written or the disk is full.
    """
    writer = None
    try:
        writer = BetonWriter(path, capacity, shape)
        yield writer
    except BaseException as error:
        if writer is not None:
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
