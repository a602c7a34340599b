"""The readers: each turns a stream of jobs into a stream of images, in order.

A reader with workers makes some batches ahead of time.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from proxynorm.data.augment import View
from proxynorm.data.ffcv.beton import Samples
from proxynorm.data.ffcv.native import REASONS, decoder
from proxynorm.data.spec import LoaderSpec
from proxynorm.errors import DataError

# Work begun ahead: some batches, and enough to keep every thread busy where the batches are small.
BATCHES_AHEAD = 3
TASKS_AHEAD_PER_WORKER = 2
IMAGES_PER_TASK = 8
POLL_SECONDS = 1.0

Result = TypeVar("Result")


class Job(NamedTuple):
    """A micro-batch to be made.

    rows: int64 (N,), of the store, -1 for padding; keys: uint64 (N,), one random stream a sample;
    size: side in pixels.
    """

    rows: np.ndarray
    keys: np.ndarray
    size: int


class Decoded(NamedTuple):
    """A job's images, uint8 (N, C, S, S), black where bad or padding; bad: place -> reason."""

    job: Job
    images: torch.Tensor
    bad: dict[int, str]


def nothing() -> None:
    """The default of each_second."""


class Reader:
    """Images and targets, int64 (N,), behind row numbers 0..N-1.

    source: the file or folder that the user gave; notes: what to tell the user, one line each;
    skipped: damaged images that have no row, name -> reason; backend: "memory", "torchvision" or
    "ffcv". A new one needs `decode`, `name`, `fingerprint`.
    """

    backend = "memory"
    channels = 3
    loader = LoaderSpec()
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, str] = {}

    def __init__(self, source: str, classes: tuple[str, ...], targets: np.ndarray) -> None:
        self.source, self.classes, self.targets = source, classes, targets

    def decode(self, job: Job, view: View) -> Decoded:
        """Return the images of a single job, made in this process."""
        raise NotImplementedError

    def stream(
        self, jobs: Iterable[Job], view: View, each_second: Callable[[], None] = nothing
    ) -> Iterator[Decoded]:
        """Yield the images of each job, in order; closing the generator ends the work begun ahead.

        each_second is called while images are waited for. Raises DataError after loader.timeout.
        """
        for job in jobs:
            yield self.decode(job, view)

    def name(self, row: int) -> str:
        """Return what to call the image in a message: its file, or its number in a file."""
        raise NotImplementedError

    def fingerprint(self, rows: np.ndarray) -> str:
        """Return "kind:digest" of the images of `rows`, int64 (N,), to tell them from others.

        Different kinds cannot be compared.
        """
        raise NotImplementedError

    def wait(self, take: Callable[[], Result | None], each_second: Callable[[], None]) -> Result:
        """Return what `take` does, called again as long as it returns None, after POLL_SECONDS.

        A signal handler that sets a flag is heeded here by each_second, which may raise. Raises
        DataError after loader.timeout seconds.
        """
        deadline = time.monotonic() + self.loader.timeout
        while (result := take()) is None:
            each_second()
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.source}: no images for {self.loader.timeout:g} s; its disk does not "
                    "answer, or a loader worker hangs: try loader.workers=0, or a longer "
                    "loader.timeout"
                )
        return result


def fingerprint(kind: str, *parts: np.ndarray) -> str:
    """Return a Reader's fingerprint: kind, and SHA-256 of the arrays' bytes, cut to 16 digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(np.ascontiguousarray(part))
    return f"{kind}:{state.hexdigest()[:16]}"


class MemoryReader(Reader):
    """Images held in memory, uint8 (N, H, W, C); made in the calling thread."""

    def __init__(
        self, images: np.ndarray, targets: np.ndarray, classes: tuple[str, ...], source: str
    ) -> None:
        super().__init__(source, classes, targets)
        self.images, self.channels = images, images.shape[3]

    def decode(self, job: Job, view: View) -> Decoded:
        images = self.images[job.rows]
        images[job.rows < 0] = 0
        return Decoded(job, torch.from_numpy(view.finish(images, job.keys, job.size)), {})

    def name(self, row: int) -> str:
        return f"image {row}"

    def fingerprint(self, rows: np.ndarray) -> str:
        return fingerprint("pixels of images", self.images[rows])


class BetonReader(Reader):
    """A .beton file, read by FFCV's decoder in loader.workers threads (at least one)."""

    backend = "ffcv"

    def __init__(self, samples: Samples, classes: tuple[str, ...], loader: LoaderSpec) -> None:
        super().__init__(str(samples.path), classes, samples.targets)
        self.samples, self.loader, self.notes = samples, loader, samples.notes
        self.workers = max(1, loader.workers)
        s, file = samples, np.memmap(samples.path, dtype=np.uint8, mode="r")
        self.stored = (file, s.mode, s.height, s.width, s.pointer, s.size, s.sums)
        self.kernel = decoder()

    def decode(self, job: Job, view: View) -> Decoded:
        return next(self.stream([job], view))

    def stream(
        self, jobs: Iterable[Job], view: View, each_second: Callable[[], None] = nothing
    ) -> Iterator[Decoded]:
        pending: deque[tuple[Job, np.ndarray, np.ndarray, list[Future]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="beton")

        def finish() -> Decoded:
            job, images, status, tasks = pending.popleft()
            self.wait(lambda: _done(tasks), each_second)
            bad = {int(place): REASONS[int(status[place])] for place in np.flatnonzero(status)}
            return Decoded(job, torch.from_numpy(view.finish(images, job.keys, job.size)), bad)

        try:
            for job in jobs:
                images, status, tasks = self._begin(pool, job, view)
                pending.append((job, images, status, tasks))
                ahead = max(BATCHES_AHEAD, TASKS_AHEAD_PER_WORKER * self.workers // len(tasks))
                if self.loader.prefetch is not None:
                    ahead = self.loader.prefetch
                if len(pending) > ahead:
                    yield finish()
            while pending:
                yield finish()
        finally:
            # Not waiting: a thread may hang in a read that never returns.
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, job: Job, view: View
    ) -> tuple[np.ndarray, np.ndarray, list[Future]]:
        """Share a job's images out among the threads.

        Returns images (N, S, S, C) and status (N,), as kernel.decode_samples gives them once all
        tasks are done, and the tasks.
        """
        count, s = len(job.rows), self.samples
        boxes = view.boxes(job.keys, s.height[job.rows], s.width[job.rows])
        # A fresh buffer each time: nothing that was handed out is written again. Page-locked
        # where there is a GPU to copy it to.
        shape, pin = (count, job.size, job.size, self.channels), torch.cuda.is_available()
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin).numpy()
        status = np.zeros(count, dtype=np.int64)
        columns = (job.rows, boxes, view.flips(job.keys), images, status)
        length = min(IMAGES_PER_TASK, math.ceil(count / self.workers))
        tasks = [
            pool.submit(
                self.kernel, self.stored, *(part[start : start + length] for part in columns)
            )
            for start in range(0, count, length)
        ]
        return images, status, tasks

    def name(self, row: int) -> str:
        return f"{self.samples.path}: image {row}"

    def fingerprint(self, rows: np.ndarray) -> str:
        """Of the checksums of the images; of a file without them, of the images' sizes."""
        s = self.samples
        if len(s.sums):
            return fingerprint("sums of images", s.sums[rows])
        return fingerprint("sizes of images", s.size[rows], s.height[rows], s.width[rows])


def _done(tasks: list[Future]) -> bool | None:
    """Return True once all tasks are done, None if they are not after POLL_SECONDS."""
    done, waiting = futures.wait(tasks, POLL_SECONDS)
    for task in done:
        task.result()
    return None if waiting else True
