"""Writes labelled images to a .beton file, and reads it back before it gets its name.

Each image is decoded and checked. FFCV's own writer is not used: it hangs when its source raises an
exception, and its output depends on the number of workers.
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
FILES_NAMED = 100  # files left aside that the manifest names; it counts them all


def prepare(
    listing: Listing,
    output: Path,
    options: StorageOptions,
    on_bad: str = "raise",
    workers: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> Samples:
    """Write `listing` to `output`, with manifest and checksums.

    on_bad: "raise" raises a DataError that names the first damaged image; "skip" leaves damaged
    images out and lists them in the manifest, "skipped": name -> reason. progress is called with
    the number of images done. An interrupted run leaves no file named `output`.
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
                    f"{listing.images[number].name}: {result}; repair or remove it, or set "
                    "on_bad=skip (in training: data.on_bad=skip)"
                )
            else:
                skipped[listing.images[number].name] = result
            progress(number + 1)
        if not kept:
            name, reason = next(iter(skipped.items()))
            raise DataError(f"{name}: {reason}; all {len(skipped)} images are damaged, repair them")
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
    """Return the versions of the libraries that decode, check and encode images."""
    return {
        "proxynorm": proxynorm.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": metadata.version("pillow"),
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "ffcv": metadata.version("ffcv") if ffcv_available() else None,
    }


def _stored(listing: Listing, options: StorageOptions, workers: int) -> Iterator[Stored | str]:
    """Yield each image in its stored form, or the reason why it has none, in order."""
    # Drawn by the image's number, so that the file's bytes do not depend on the workers.
    draws = uniform(sample_keys(0, 0, np.arange(len(listing.images))), 0).tolist()
    workers = max(1, workers)
    ahead = IMAGES_PER_WORKER * workers
    # Threads suffice: the decoders and encoders release Python's lock while they work.
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(draws), ahead):
            part = slice(start, start + ahead)
            yield from pool.map(_store, listing.images[part], repeat(options), draws[part])


def _store(ref: ImageRef, options: StorageOptions, draw: float) -> Stored | str:
    try:
        return store(ref, options, draw)
    except BadImage as reason:
        return str(reason)
    except Exception as error:  # such as MemoryError in resizing
        return f"cannot be stored ({type(error).__name__})"


class BetonWriter:
    """Writes one .beton file under a temporary name. Create it with new_beton.

    file: opened under that name; capacity: the largest number of samples.
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
        self.file.seek(HEADER.itemsize + self.fields.nbytes + self.records.nbytes)
        self._to_next_page()

    def add(self, image: Stored, target: int) -> None:
        """Append a sample: an image and its class."""
        pointer, size = self.file.tell(), len(image.data)
        # FFCV's page cache requires that no sample crosses a page boundary.
        if pointer // PAGE_SIZE != (pointer + size - 1) // PAGE_SIZE:
            pointer = self._to_next_page()
        self.file.write(image.data)
        self.records[self.count] = (image.mode, image.width, image.height, pointer), target
        self.allocations[self.count] = (self.count, pointer, size)
        self.sums[self.count] = byte_sum(np.frombuffer(image.data, np.uint8))
        self.count += 1

    def _to_next_page(self) -> int:
        """Seek to the next page boundary, unless the file is at one, and return the position."""
        return self.file.seek(-(-self.file.tell() // PAGE_SIZE) * PAGE_SIZE)

    def close(self, manifest: dict) -> None:
        """Finish the file, read it back, and give it and its companions their names.

        Raises DataError if the bytes read back are not those written.
        """
        # FFCV's page cache reads whole pages, so the last one must be full.
        table = self._to_next_page()
        self.file.write(self.allocations[: self.count].tobytes())
        header = np.array((VERSION, 2, PAGE_SIZE, self.count, table), dtype=HEADER)
        head = header.tobytes() + self.fields.tobytes() + self.records[: self.count].tobytes()
        self.file.seek(0)
        self.file.write(head)
        self.file.flush()
        os.fsync(self.file.fileno())
        # Drop it from the page cache, if the system can, so that reading back tests the disk.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        sums, temporary = self.sums[: self.count], _temporary(self.path)
        if changed := changed_images(replace(read_beton(temporary), sums=sums)):
            raise DataError(
                f"{changed[0]}: {CHANGED}; {len(changed)} of {self.count} images are "
                "damaged, write the file again"
            )
        contents = {**manifest, "bytes": temporary.stat().st_size}
        contents[DIGEST] = digest(head, sums, contents)
        # After an interruption here, the digest shows that an old file has new companions.
        write_atomic(sums_path(self.path), lambda file: np.save(file, sums))
        write_text(manifest_path(self.path), json.dumps(contents, indent=1) + "\n")
        os.replace(temporary, self.path)
        sync_folder(self.path.parent)


def _temporary(path: Path) -> Path:
    """Return the name of a file while it is being written."""
    return path.with_name(f".{path.name}.tmp")


def _open_locked(path: Path) -> BinaryIO:
    """Open the temporary file of `path`, empty, and lock it while it is open.

    The file of a killed writer is overwritten, as its lock ended with it. Raises DataError if
    another process holds the lock.
    """
    while True:
        file = os.fdopen(os.open(_temporary(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(
                f"{path}: another process is writing it; wait for it, or give another name"
            ) from None
        except OSError:
            pass  # a file system without locks; reading back detects a second writer's bytes
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(_temporary(path))):
                file.truncate(0)
                return file
        # Another writer finished between open and lock, and this is now its finished file.
        file.close()


@contextmanager
def new_beton(path: Path, capacity: int) -> Iterator[BetonWriter]:
    """Yield a BetonWriter, to add to and to close. An exception removes the unfinished file.

    Raises FileError if the folder cannot be written or the disk is full, and DataError if another
    process is writing the file.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
        try:
            yield BetonWriter(path, file, capacity)
        except BaseException:
            _temporary(path).unlink(missing_ok=True)
            raise
        finally:
            with suppress(OSError):  # a full disk refuses what is still buffered
                file.close()  # which releases the lock
