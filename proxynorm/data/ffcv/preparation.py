"""Turns labelled images into a .beton file: each is decoded and checked, the file verified."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import features

import proxynorm
from proxynorm.data.ffcv.native import library_versions
from proxynorm.data.ffcv.verification import verify
from proxynorm.data.ffcv.writer import new_beton
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
    """The result of prepare: the file, how many images are in it, what was left out or converted.

    skipped: name -> reason; converted: kind of conversion -> number of images.
    """

    path: Path
    count: int
    skipped: dict[str, str]
    converted: dict[str, int]


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
    converted: dict[str, list[str]] = defaultdict(list)
    kept = []
    with new_beton(output, len(listing.images)) as writer:
        for number, result in enumerate(_stored(listing, options, workers)):
            name, target = listing.images[number].name, int(listing.targets[number])
            if isinstance(result, Stored):
                data = np.frombuffer(result.data, np.uint8)
                writer.add(data, target, result.height, result.width, result.mode)
                kept.append(target)
                for kind in result.converted:
                    converted[kind].append(name)
            elif on_bad == "raise":
                raise DataError(
                    f"{name}: {result}; mend or remove it, or set on_bad=skip (in training: "
                    "data.on_bad=skip)"
                )
            else:
                skipped[name] = result
            progress(number + 1)
        if empty := set(listing.targets.tolist()) - set(kept):
            first = listing.images[listing.targets.tolist().index(min(empty))].name
            raise DataError(
                f"every image of class {listing.classes[min(empty)]} is bad (the first, {first}: "
                f"{skipped[first]}); mend them or remove the class"
            )
        manifest = _manifest(listing, kept, options, skipped, converted)
        writer.close(manifest, lambda samples: verify(samples, workers))
    counts = {kind: len(names) for kind, names in sorted(converted.items())}
    return Prepared(Path(output), len(kept), skipped, counts)


def _manifest(
    listing: Listing,
    kept: list[int],
    options: StorageOptions,
    skipped: dict[str, str],
    converted: dict[str, list[str]],
) -> dict:
    def counted(names: Sequence[str]) -> dict:
        return {"count": len(names), "files": list(names[:FILES_NAMED])}

    counts = Counter(kept)
    return {
        "classes": list(listing.classes),
        "count": len(kept),
        "count_per_class": {name: counts[target] for target, name in enumerate(listing.classes)},
        "options": asdict(options),
        "skipped": skipped,
        "converted": {kind: counted(names) for kind, names in sorted(converted.items())},
        "left_aside": counted(listing.aside),
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    """Return the versions of what decodes, encodes and verifies images."""
    return {
        "proxynorm": proxynorm.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": version("pillow"),
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        **library_versions(),
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
    pending: deque = deque()
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
