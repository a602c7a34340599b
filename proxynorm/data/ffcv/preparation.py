"""Turns labelled images into a .beton file: each is decoded and checked, the file read back."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import features

import proxynorm
from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.data.ffcv.native import ffcv_available
from proxynorm.data.ffcv.writer import new_beton
from proxynorm.data.images import BadImage, ImageRef, StorageOptions, Stored, store
from proxynorm.data.randomness import sample_keys, uniform
from proxynorm.data.sources import Listing
from proxynorm.errors import DataError

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
