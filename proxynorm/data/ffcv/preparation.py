"""Labelled images into a .beton file: each image decoded and checked first, the file verified
before it is named."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import features

import proxynorm
from proxynorm.data.ffcv.beton import new_beton
from proxynorm.data.ffcv.native import library_versions
from proxynorm.data.ffcv.verification import verify
from proxynorm.data.images import BadImage, ImageRef, StorageOptions, Stored, store
from proxynorm.data.randomness import sample_keys, uniform
from proxynorm.data.sources import Listing
from proxynorm.errors import DataError

IMAGES_PER_TASK = 16
TASKS_AHEAD_PER_WORKER = 4
# Of each kind of conversion the manifest names the first so many files; it counts all.
FILES_NAMED = 100
ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Prepared:
    """What prepare did: the file, the number of images in it, what was left out, name -> reason,
    and what was converted, kind (images.conversions) -> number of images."""

    path: Path
    count: int
    skipped: dict[str, str]
    converted: dict[str, int] = field(default_factory=dict)


def prepare(
    listing: Listing,
    output: Path,
    options: StorageOptions,
    on_bad: str = "raise",
    workers: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> Prepared:
    """Write `listing` to `output`, with its manifest and sums beside it; the bytes do not depend on
    `workers`.

    on_bad: "raise" ends in a DataError that names the first bad image, "skip" leaves bad images
    out. progress is told how many images are done. An interrupted run leaves nothing named
    `output`.
    """
    skipped: dict[str, str] = {}
    converted: dict[str, list[str]] = defaultdict(list)
    kept = []
    with new_beton(output, channels=3, capacity=len(listing.images)) as writer:
        for number, result in enumerate(_stored(listing, options, workers)):
            if isinstance(result, Stored):
                target = int(listing.targets[number])
                writer.add(
                    np.frombuffer(result.data, np.uint8),
                    target,
                    result.height,
                    result.width,
                    result.mode,
                )
                kept.append(target)
                for kind in result.converted:
                    converted[kind].append(listing.images[number].name)
            elif on_bad == "raise":
                raise DataError(
                    f"{listing.images[number].name}: {result}; mend or remove it, or set "
                    f"on_bad=skip (in training: "
                    "data.on_bad=skip)"
                )
            else:
                skipped[listing.images[number].name] = result
            progress(number + 1)
        _check_classes(listing, kept, output)
        manifest = _manifest(listing, kept, options, skipped, converted)
        writer.close(manifest, lambda samples: verify(samples, workers))
    return Prepared(
        Path(output),
        len(kept),
        skipped,
        {kind: len(names) for kind, names in sorted(converted.items())},
    )


def _check_classes(listing: Listing, kept: list[int], output: Path) -> None:
    empty = set(listing.targets.tolist()) - set(kept)
    if empty:
        raise DataError(
            f"{output}: every image of class {listing.classes[min(empty)]} is bad; mend it or "
            f"remove the class"
        )


def _manifest(
    listing: Listing,
    kept: list[int],
    options: StorageOptions,
    skipped: dict[str, str],
    converted: dict[str, list[str]],
) -> dict:
    counts = Counter(kept)
    return {
        "classes": list(listing.classes),
        "count": len(kept),
        "count_per_class": {name: counts[target] for target, name in enumerate(listing.classes)},
        "options": asdict(options),
        "skipped": skipped,
        "converted": {
            kind: {"count": len(names), "files": names[:FILES_NAMED]}
            for kind, names in sorted(converted.items())
        },
        "left_aside": {"count": len(listing.aside), "files": list(listing.aside[:FILES_NAMED])},
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    """What the images went through: Pillow and its libjpeg-turbo decode and encode, FFCV and its
    libraries verify."""
    return {
        "proxynorm": proxynorm.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": version("pillow"),
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        **library_versions(),
    }


def _stored(listing: Listing, options: StorageOptions, workers: int) -> Iterator[Stored | str]:
    """Each image as it will be stored, or the reason why not, in the order of the listing."""
    draws = uniform(sample_keys(0, 0, np.arange(len(listing.images))), 0)
    tasks = [
        (listing.images[start : start + IMAGES_PER_TASK], draws[start : start + IMAGES_PER_TASK])
        for start in range(0, len(draws), IMAGES_PER_TASK)
    ]
    if workers <= 1:
        for refs, numbers in tasks:
            yield from _store_all(refs, options, numbers)
        return
    pool = ProcessPoolExecutor(workers, initializer=_obey_parent)
    pending: deque = deque()
    try:
        for refs, numbers in tasks:
            with (
                _signals_held()
            ):  # the first one forks the workers, which an exception would leave without a master
                pending.append(pool.submit(_store_all, refs, options, numbers))
            if len(pending) > TASKS_AHEAD_PER_WORKER * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, most likely for lack of memory; give fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait meanwhile. By handlers: a mask would leave them to the other
    threads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: waiting.append(number))
        for number in ENDING
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for number in waiting:
        signal.raise_signal(number)


def _obey_parent() -> None:
    """Have this worker leave Ctrl-C to its parent, and end when that is killed.

    It would otherwise wait for work for ever, and hold the file's lock.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _store_all(
    refs: list[ImageRef], options: StorageOptions, draws: np.ndarray
) -> list[Stored | str]:
    return [_store_one(ref, options, float(draw)) for ref, draw in zip(refs, draws)]


def _store_one(ref: ImageRef, options: StorageOptions, draw: float) -> Stored | str:
    try:
        return store(ref, options, draw)
    except BadImage as reason:
        return str(reason)
