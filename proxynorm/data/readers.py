"""The readers: each turns a stream of jobs into a stream of images, in order.

A reader with workers decodes some batches in advance.
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

from proxynorm.data.augment import Transform
from proxynorm.data.ffcv.beton import Samples
from proxynorm.data.ffcv.native import REASONS, decoder
from proxynorm.data.spec import LoaderSpec
from proxynorm.errors import DataError

# Work begun in advance: a few batches, or more if small batches would leave threads idle.
BATCHES_AHEAD = 3
TASKS_AHEAD_PER_WORKER = 2
IMAGES_PER_TASK = 8
POLL_SECONDS = 1.0  # how often a wait for images is interrupted

Result = TypeVar("Result")


class Job(NamedTuple):
    """A micro-batch to decode.

    rows: the reader's row numbers, int64 (N,), -1 for padding; keys: one random stream per sample,
    uint64 (N,); size: side in pixels.
    """

    rows: np.ndarray
    keys: np.ndarray
    size: int


class Decoded(NamedTuple):
    """A job's images, uint8 (N, C, S, S), black for damage and padding; bad: index -> reason."""

    job: Job
    images: torch.Tensor
    bad: dict[int, str]


def do_nothing() -> None:
    """The default of each_second."""


class Reader:
    """Images and their targets, int64 (N,), by row numbers 0..N-1.

    source: the file or folder that the user gave; notes: warnings for the user, one line each;
    skipped: damaged images that have no row, name -> reason; backend: "memory", "torchvision" or
    "ffcv". Subclasses define `decode`, `name` and `fingerprint`.
    """

    backend = "memory"
    channels = 3
    loader = LoaderSpec()
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, str] = {}

    def __init__(self, source: str, classes: tuple[str, ...], targets: np.ndarray) -> None:
        self.source, self.classes, self.targets = source, classes, targets

    def decode(self, job: Job, transform: Transform) -> Decoded:
        """Return the images of a single job, decoded in this process."""
        raise NotImplementedError

    def stream(
        self,
        jobs: Iterable[Job],
        transform: Transform,
        each_second: Callable[[], None] = do_nothing,
    ) -> Iterator[Decoded]:
        """Yield the images of each job, in order. Closing the generator cancels pending jobs.

        each_second is called during waits. Raises DataError after a wait of loader.timeout seconds.
        """
        for job in jobs:
            yield self.decode(job, transform)

    def name(self, row: int) -> str:
        """Return the image's name in messages: its file, or its number in a file."""
        raise NotImplementedError

    def fingerprint(self, rows: np.ndarray) -> str:
        """Return "kind:digest" of the images of `rows`, int64 (N,), to recognize them.

        Only fingerprints of one kind can be compared.
        """
        raise NotImplementedError

    def wait(self, take: Callable[[], Result | None], each_second: Callable[[], None]) -> Result:
        """Call `take` until its result is true, and return it. Each call may last POLL_SECONDS.

        each_second is called in between; it may raise, to end the wait after a signal. Raises
        DataError after loader.timeout seconds.
        """
        deadline = time.monotonic() + self.loader.timeout
        while not (result := take()):
            each_second()
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.source}: no images for {self.loader.timeout:g} s; its disk does not "
                    "answer, or a loader worker hangs: try loader.workers=0 or a longer "
                    "loader.timeout"
                )
        return result


def fingerprint_of(kind: str, *parts: np.ndarray) -> str:
    """Return a fingerprint for Reader: the kind, and 16 digits of the arrays' SHA-256."""
    state = hashlib.sha256()
    for part in parts:
        state.update(np.ascontiguousarray(part))
    return f"{kind}:{state.hexdigest()[:16]}"


class MemoryReader(Reader):
    """Images held in memory, uint8 (N, H, W, C), and prepared in the calling thread."""

    def __init__(
        self, images: np.ndarray, targets: np.ndarray, classes: tuple[str, ...], source: str
    ) -> None:
        super().__init__(source, classes, targets)
        self.images, self.channels = images, images.shape[3]

    def decode(self, job: Job, transform: Transform) -> Decoded:
        images = self.images[job.rows]
        images[job.rows < 0] = 0  # padding: index -1 took the last image
        return Decoded(job, torch.from_numpy(transform.finish(images, job.keys, job.size)), {})

    def name(self, row: int) -> str:
        return f"image {row}"

    def fingerprint(self, rows: np.ndarray) -> str:
        return fingerprint_of("pixels of images", self.images[rows])


class BetonReader(Reader):
    """Reads a .beton file with FFCV's decoder in loader.workers threads, at least one."""

    backend = "ffcv"

    def __init__(self, samples: Samples, classes: tuple[str, ...], loader: LoaderSpec) -> None:
        super().__init__(str(samples.path), classes, samples.targets)
        self.samples, self.loader, self.notes = samples, loader, samples.notes
        self.workers = max(1, loader.workers)
        file, s = np.memmap(samples.path, dtype=np.uint8, mode="r"), samples
        self.stored = (file, s.mode, s.height, s.width, s.pointer, s.size, s.sums)
        self.kernel = decoder()

    def decode(self, job: Job, transform: Transform) -> Decoded:
        return next(self.stream([job], transform))

    def stream(
        self,
        jobs: Iterable[Job],
        transform: Transform,
        each_second: Callable[[], None] = do_nothing,
    ) -> Iterator[Decoded]:
        pending: deque[tuple[Job, np.ndarray, np.ndarray, list[Future]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="beton")

        def finish() -> Decoded:
            job, images, status, tasks = pending.popleft()
            self.wait(lambda: not futures.wait(tasks, POLL_SECONDS).not_done, each_second)
            for task in tasks:
                task.result()  # raises the task's exception, if any
            bad = {int(index): REASONS[int(status[index])] for index in np.flatnonzero(status)}
            return Decoded(job, torch.from_numpy(transform.finish(images, job.keys, job.size)), bad)

        try:
            for job in jobs:
                images, status, tasks = self._begin(pool, job, transform)
                pending.append((job, images, status, tasks))
                ahead = max(BATCHES_AHEAD, TASKS_AHEAD_PER_WORKER * self.workers // len(tasks))
                if self.loader.prefetch is not None:
                    ahead = self.loader.prefetch
                if len(pending) > ahead:
                    yield finish()
            while pending:
                yield finish()
        finally:
            # Do not wait: a thread may hang in a read that never returns.
            pool.shutdown(wait=False, cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, job: Job, transform: Transform
    ) -> tuple[np.ndarray, np.ndarray, list[Future]]:
        """Submit the decoding of a job's images, in tasks of a few images each.

        Returns images (N, S, S, C) and status (N,), which kernel.decode_samples fills, and the
        tasks.
        """
        count, s = len(job.rows), self.samples
        boxes = transform.boxes(job.keys, s.height[job.rows], s.width[job.rows])
        # A new buffer for each job, because the caller keeps it. Pinned for copies to a GPU.
        shape, pin = (count, job.size, job.size, self.channels), torch.cuda.is_available()
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin).numpy()
        status = np.zeros(count, dtype=np.int64)
        columns = (job.rows, boxes, transform.flips(job.keys), images, status)
        length = min(IMAGES_PER_TASK, math.ceil(count / self.workers))
        parts = (slice(start, start + length) for start in range(0, count, length))
        tasks = [
            pool.submit(self.kernel, self.stored, *(column[part] for column in columns))
            for part in parts
        ]
        return images, status, tasks

    def name(self, row: int) -> str:
        return f"{self.samples.path}: image {row}"

    def fingerprint(self, rows: np.ndarray) -> str:
        """Cover the images' checksums or, in a file without them, the images' sizes."""
        s = self.samples
        if len(s.sums):
            return fingerprint_of("sums of images", s.sums[rows])
        return fingerprint_of("sizes of images", s.size[rows], s.height[rows], s.width[rows])
