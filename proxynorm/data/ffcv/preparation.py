"""Turns labelled images into a .beton file: each is decoded and checked, the file read back."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import features

import proxynorm
from proxynorm.data.ffcv.native import ffcv_available
from proxynorm.data.ffcv.writer import new_beton
from proxynorm.data.images import BadImage, ImageRef, StorageOptions, Stored, store
from proxynorm.data.randomness import sample_keys, uniform
from proxynorm.data.sources import Listing
from proxynorm.errors import DataError

IMAGES_PER_TASK = 16
TASKS_AHEAD_PER_WORKER = 4
# Of the files that are no images the manifest names the first so many; it counts all.
FILES_NAMED = 100
ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Prepared:
    """The result of prepare: the file, how many images are in it, and what was left out.

    skipped: name -> reason; notes: what the user should be told, one line each.
    """

    path: Path
    count: int
    skipped: dict[str, str]
    notes: tuple[str, ...]


def prepare(
    listing: Listing,
    output: Path,
    options: StorageOptions,
    on_bad: str = "raise",
    workers: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> Prepared:
    """Write `listing` to `output`, with manifest and checksums; `workers` do not change the bytes.

    on_bad: "raise" ends in a DataError that names the first bad image, "skip" leaves bad images
    out. progress is told how many images are done. An interrupted run leaves nothing named
    `output`.
    """
    skipped: dict[str, str] = {}
    kept: Counter[int] = Counter()
    targets = listing.targets.tolist()
    with new_beton(output, len(targets)) as writer:
        for number, result in enumerate(_stored(listing, options, workers)):
            if isinstance(result, Stored):
                data = np.frombuffer(result.data, np.uint8)
                writer.add(data, targets[number], result.height, result.width, result.mode)
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
        writer.close(
            {
                "classes": list(listing.classes),
                "count": kept.total(),
                "count_per_class": {name: kept[n] for n, name in enumerate(listing.classes)},
                "options": asdict(options),
                "skipped": skipped,
                "left_aside": {
                    "count": len(listing.aside),
                    "files": list(listing.aside[:FILES_NAMED]),
                },
                "versions": _versions(),
            }
        )
    empty = [listing.classes[target] for target in sorted(set(targets) - set(kept))]
    return Prepared(Path(output), kept.total(), skipped, without_images(output, empty))


def without_images(source: Path, empty: list[str]) -> tuple[str, ...]:
    """Return a line on the classes of which no image is left; they keep their numbers."""
    if not empty:
        return ()
    return (f"{source}: no image is left of {len(empty)} class(es), such as {empty[0]}",)


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
    draws = uniform(sample_keys(0, 0, np.arange(len(listing.images))), 0)
    tasks = (
        (listing.images[start : start + IMAGES_PER_TASK], draws[start : start + IMAGES_PER_TASK])
        for start in range(0, len(draws), IMAGES_PER_TASK)
    )
    if workers <= 1:
        for refs, numbers in tasks:
            yield from _store_all(refs, options, numbers)
        return
    pool = ProcessPoolExecutor(workers, initializer=_obey_parent)
    pending: deque[Future[list[Stored | str]]] = deque()
    try:
        for refs, numbers in tasks:
            # The first submit forks the workers; an exception then would leave them running.
            with _signals_held():
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
    """Delay SIGINT and SIGTERM. By handlers: other threads would get what this one masks."""
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
    """Leave Ctrl-C to the parent process, and end when that is killed.

    This worker would otherwise wait for work for ever, and hold the file's lock.
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
    except Exception as error:  # such as MemoryError while it is made smaller
        return f"cannot be stored ({type(error).__name__})"
