"""Turns labelled images into a .beton file, which is read back before it gets its name.

Each image is decoded and checked. FFCV's own writer is not used: it hangs when its source raises,
and its output depends on the number of workers.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib import metadata
from itertools import repeat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import features

import proxynorm
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
    Samples,
    byte_sum,
    changed_images,
    digest,
    manifest_path,
    read_beton,
    sums_path,
)
from proxynorm.data.ffcv.native import ffcv_available
from proxynorm.data.images import BadImage, ImageRef, StorageOptions, Stored, store
from proxynorm.data.randomness import sample_keys, uniform
from proxynorm.data.sources import Listing
from proxynorm.errors import DataError
from proxynorm.files import sync_folder, write_atomic, write_text, writing

IMAGES_PER_WORKER = 32
# Of the files that are no images the manifest names the first so many; it counts all.
FILES_NAMED = 100


def prepare(
    listing: Listing,
    output: Path,
    options: StorageOptions,
    on_bad: str = "raise",
    workers: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> Samples:
    """Write `listing` to `output`, with manifest and checksums; `workers` do not change the bytes.

    on_bad: "raise" ends in a DataError that names the first bad image, "skip" leaves bad images
    out and lists them in the manifest: "skipped", name -> reason. progress is told how many images
    are done. An interrupted run leaves nothing named `output`.
    """
    skipped: dict[str, str] = {}
    kept: Counter[int] = Counter()
    targets = listing.targets.tolist()
    with new_beton(output, len(targets)) as writer:
        for number, result in enumerate(_stored(listing, options, workers)):
            if isinstance(result, Stored):
                writer.add(result, targets[number])
                kept[targets[number]] += 1
            elif on_bad == "raise":
                raise DataError(
                    f"{listing.images[number].name}: {result}; mend or remove it, or set "
                    "on_bad=skip (in training: data.on_bad=skip)"
                )
            else:
                skipped[listing.images[number].name] = result
            progress(number + 1)
        if not kept:
            name, reason = next(iter(skipped.items()))
            raise DataError(f"{name}: {reason}; all {len(skipped)} images are damaged, mend them")
        aside = {"count": len(listing.aside), "files": list(listing.aside[:FILES_NAMED])}
        writer.close(
            {
                "classes": list(listing.classes),
                "count": kept.total(),
                "count_per_class": {name: kept[n] for n, name in enumerate(listing.classes)},
                "options": asdict(options),
                "skipped": skipped,
                "left_aside": aside,
                "versions": _versions(),
            }
        )
    return read_beton(output)


def _versions() -> dict[str, str | None]:
    """Return the versions of what decodes, checks and encodes images."""
    return {
        "proxynorm": proxynorm.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": metadata.version("pillow"),
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "ffcv": metadata.version("ffcv") if ffcv_available() else None,
    }


def _stored(listing: Listing, options: StorageOptions, workers: int) -> Iterator[Stored | str]:
    """Yield each image as it will be stored, or the reason why not, in the order of the listing."""
    draws = uniform(sample_keys(0, 0, np.arange(len(listing.images))), 0).tolist()
    workers = max(1, workers)
    ahead = IMAGES_PER_WORKER * workers
    # Threads serve: the decoders and encoders release Python's lock while they work.
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(draws), ahead):
            part = slice(start, start + ahead)
            yield from pool.map(_store, listing.images[part], repeat(options), draws[part])


def _store(ref: ImageRef, options: StorageOptions, draw: float) -> Stored | str:
    try:
        return store(ref, options, draw)
    except BadImage as reason:
        return str(reason)
    except Exception as error:  # such as MemoryError while it is made smaller
        return f"cannot be stored ({type(error).__name__})"


class BetonWriter:
    """Writes one .beton file under a temporary name; use new_beton.

    file: opened under that name; capacity: the most samples that will be added.
    """

    def __init__(self, path: Path, file: BinaryIO, capacity: int) -> None:
        self.path, self.file, self.count = path, file, 0
        self.fields = np.zeros(2, dtype=FIELD)
        self.fields["type_id"] = IMAGE_FIELD, INT_FIELD
        for row, name in zip(self.fields, (b"image", b"label")):
            row["name"][: len(name)] = np.frombuffer(name, dtype="<u1")
        self.records = np.zeros(capacity, dtype=RECORD)
        self.allocations = np.zeros(capacity, dtype=ALLOCATION)
        self.sums = np.zeros(capacity, dtype=np.uint64)
        self._to_next_page(HEADER.itemsize + self.fields.nbytes + self.records.nbytes)

    def add(self, image: Stored, target: int) -> None:
        """Append a sample: an image and its class."""
        pointer, size = self._place(len(image.data)), len(image.data)
        self.file.write(image.data)
        self.records[self.count] = (image.mode, image.width, image.height, pointer), target
        self.allocations[self.count] = (self.count, pointer, size)
        self.sums[self.count] = byte_sum(np.frombuffer(image.data, np.uint8))
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
        self.file.flush()
        os.fsync(self.file.fileno())
        # Out of the page cache, where the system allows it, so that reading back tests the disk.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        sums, temporary = self.sums[: self.count], _hidden(self.path)
        if changed := changed_images(replace(read_beton(temporary), sums=sums)):
            raise DataError(
                f"{changed[0]}: {CHANGED}; {len(changed)} of {self.count} images are "
                "damaged, write the file again"
            )
        contents = {**manifest, "bytes": temporary.stat().st_size}
        contents[DIGEST] = digest(head, sums, contents)
        # If this is interrupted, the digest tells an old file from the new one's companions.
        write_atomic(sums_path(self.path), lambda file: np.save(file, sums))
        write_text(manifest_path(self.path), json.dumps(contents, indent=1) + "\n")
        os.replace(temporary, self.path)
        sync_folder(self.path.parent)


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

    Raises FileError if the folder cannot be written or the disk is full, and DataError if another
    process is writing the file.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_alone(path)
        try:
            yield BetonWriter(path, file, capacity)
        except BaseException:
            _hidden(path).unlink(missing_ok=True)
            raise
        finally:
            with suppress(OSError):  # a full disk refuses what is still buffered
                file.close()  # and with it the lock
