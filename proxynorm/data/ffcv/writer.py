"""Writes labelled images to a .beton file, and reads it back before it gets its final name.

Each image is decoded and checked. FFCV's own writer is not used: it hangs when its source raises an
exception, and its output depends on the number of workers.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from proxynorm.files import locked, sync_folder, write_atomic, write_text, writing

IMAGES_PER_WORKER = 32
FIELDS = np.zeros(2, dtype=FIELD)
FIELDS["type_id"] = IMAGE_FIELD, INT_FIELD
FIELDS["name"][:, :5] = list(b"image"), list(b"label")
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
    the number of images done. An interrupted run leaves no file named `output`. Raises FileError if
    it cannot be written, or if another process is writing it.
    """
    busy = f"{output}: another process is writing it; wait for it, or give another name"
    # A killed writer leaves this file, which the next one empties.
    temporary = output.with_name(f".{output.name}.tmp")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(output.with_name(f".{output.name}.lock"), busy):
            try:
                with open(temporary, "wb") as file:
                    head, sums, manifest = _write(file, listing, options, on_bad, workers, progress)
                    file.flush()
                    os.fsync(file.fileno())
                    # Drop it from the page cache, so that reading back tests the disk.
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                _finish(temporary, output, head, sums, manifest)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    return read_beton(output)


def _write(
    file: BinaryIO,
    listing: Listing,
    options: StorageOptions,
    on_bad: str,
    workers: int,
    progress: Callable[[int], None],
) -> tuple[bytes, np.ndarray, dict]:
    """Write a .beton file. Returns its head, its checksums, uint64 (N,), and its manifest."""
    capacity, count = len(listing.images), 0
    records, allocations = np.zeros(capacity, RECORD), np.zeros(capacity, ALLOCATION)
    sums, skipped = np.zeros(capacity, np.uint64), {}
    file.seek(HEADER.itemsize + FIELDS.nbytes + records.nbytes)
    _to_next_page(file)
    for number, image in enumerate(_stored(listing, options, workers)):
        name = listing.images[number].name
        if isinstance(image, Stored):
            pointer = _append(file, image.data)
            record = (image.mode, image.width, image.height, pointer), listing.targets[number]
            records[count], allocations[count] = record, (count, pointer, len(image.data))
            sums[count] = byte_sum(np.frombuffer(image.data, np.uint8))
            count += 1
        elif on_bad == "raise":
            raise DataError(
                f"{name}: {image}; repair or remove it, or set on_bad=skip (in training: "
                "data.on_bad=skip)"
            )
        else:
            skipped[name] = image
        progress(number + 1)
    if not count:
        name, reason = next(iter(skipped.items()))
        raise DataError(f"{name}: {reason}; all {len(skipped)} images are damaged, repair them")
    head = _write_tables(file, records[:count], allocations[:count])
    per_class = np.bincount(records["label"][:count], minlength=len(listing.classes)).tolist()
    manifest = {
        "classes": list(listing.classes),
        "count": count,
        "count_per_class": dict(zip(listing.classes, per_class)),
        "options": asdict(options),
        "skipped": skipped,
        "left_aside": {"count": len(listing.aside), "files": list(listing.aside[:FILES_NAMED])},
        "versions": _versions(),
    }
    return head, sums[:count], manifest


def _write_tables(file: BinaryIO, records: np.ndarray, allocations: np.ndarray) -> bytes:
    """Write the allocation table and the head, which is returned."""
    # FFCV's page cache reads whole pages, so the last one must be full.
    table = _to_next_page(file)
    file.write(allocations.tobytes())
    header = np.array((VERSION, len(FIELDS), PAGE_SIZE, len(records), table), dtype=HEADER)
    head = header.tobytes() + FIELDS.tobytes() + records.tobytes()
    file.seek(0)
    file.write(head)
    return head


def _append(file: BinaryIO, data: bytes) -> int:
    """Write an image's bytes and return their position in the file."""
    pointer = file.tell()
    # FFCV's page cache requires that no sample crosses a page boundary.
    if pointer // PAGE_SIZE != (pointer + len(data) - 1) // PAGE_SIZE:
        pointer = _to_next_page(file)
    file.write(data)
    return pointer


def _to_next_page(file: BinaryIO) -> int:
    """Seek to the next page boundary, unless the file is at one, and return the position."""
    return file.seek(-(-file.tell() // PAGE_SIZE) * PAGE_SIZE)


def _finish(temporary: Path, output: Path, head: bytes, sums: np.ndarray, manifest: dict) -> None:
    """Read the file back, and give it and its companions their final names.

    Raises DataError if the bytes read back are not those written.
    """
    if changed := changed_images(replace(read_beton(temporary), sums=sums)):
        raise DataError(
            f"{changed[0]}: {CHANGED}; {len(changed)} of {len(sums)} images are damaged, write the "
            "file again"
        )
    contents = {**manifest, "bytes": temporary.stat().st_size}
    contents[DIGEST] = digest(head, sums, contents)
    # After an interruption here, the digest shows that an old file has new companions.
    write_atomic(sums_path(output), lambda file: np.save(file, sums))
    write_text(manifest_path(output), json.dumps(contents, indent=1) + "\n")
    os.replace(temporary, output)
    sync_folder(output.parent)


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
