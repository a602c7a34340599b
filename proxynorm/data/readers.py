"""The readers: each turns a stream of jobs into a stream of batches, in order.

A reader with workers makes some batches ahead of time.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from proxynorm.data.augment import View
from proxynorm.data.ffcv.beton import Samples
from proxynorm.data.ffcv.native import GOOD, REASONS, decoder, map_file
from proxynorm.data.spec import Batch, LoaderSpec
from proxynorm.errors import DataError

# Work begun ahead: some batches, and enough to keep every thread busy where the batches are small.
BATCHES_AHEAD = 3
TASKS_AHEAD_PER_WORKER = 2
IMAGES_PER_TASK = 8
POLL_SECONDS = 1.0

T = TypeVar("T")


class Job(NamedTuple):
    """A micro-batch to be made.

    rows: int64 (N,), of the store, -1 for padding; keys: uint64 (N,), one random stream a sample;
    size: side in pixels.
    """

    rows: np.ndarray
    keys: np.ndarray
    size: int


class Failures:
    """Damaged images: under "raise" one stops the run, under "skip" each is left out and listed."""

    def __init__(self, on_bad: str) -> None:
        self.on_bad = on_bad
        self.reasons: dict[str, str] = {}

    def record(self, name: str, reason: str) -> None:
        """Note a damaged image. Raises DataError under the policy "raise"."""
        if self.on_bad == "raise":
            raise DataError(
                f"{name}: {reason}; mend it (a .beton file: write it again), or set "
                "data.on_bad=skip"
            )
        self.reasons[name] = reason


def nothing() -> None:
    """The default of each_second."""


class Reader(Protocol):
    """Images and targets behind row numbers 0..len(targets)-1.

    source: the file or folder that the user gave; notes: what to tell the user, one line each.
    """

    classes: tuple[str, ...]
    channels: int
    targets: np.ndarray
    source: str
    notes: tuple[str, ...]

    def stream(
        self,
        jobs: Iterable[Job],
        view: View,
        failures: Failures,
        each_second: Callable[[], None] = nothing,
    ) -> Iterator[Batch]:
        """Yield a batch per job, in order; closing the generator ends the work begun ahead.

        each_second is called while a batch is waited for. Raises DataError after loader.timeout.
        """

    def read(self, job: Job, view: View, failures: Failures) -> Batch:
        """Return the batch of a single job, made in this process."""

    def name(self, row: int) -> str:
        """Return what to call the image in a message: its file, or its number in a file."""

    def fingerprint(self, rows: np.ndarray) -> str:
        """Return "kind:digest" of the images of `rows`, int64 (N,), to tell them from others.

        Different kinds cannot be compared.
        """


def wait(
    take: Callable[[float], T | None], loader: LoaderSpec, source: str, each_second: Callable
) -> T:
    """Return what take(seconds) does, called again as long as it returns None.

    A signal handler that sets a flag is heeded here by each_second, which may raise. Raises
    DataError after loader.timeout seconds.
    """
    deadline = time.monotonic() + loader.timeout
    while (result := take(POLL_SECONDS)) is None:
        each_second()
        if time.monotonic() > deadline:
            raise DataError(
                f"{source}: no images for {loader.timeout:g} s; its disk does not answer, or a "
                "loader worker hangs: try loader.workers=0, or a longer loader.timeout"
            )
    return result


def fingerprint(kind: str, *parts: np.ndarray) -> str:
    """Return a Reader's fingerprint: kind, and SHA-256 of the arrays' bytes, cut to 16 digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(np.ascontiguousarray(part))
    return f"{kind}:{state.hexdigest()[:16]}"


def assemble(
    reader: Reader, job: Job, images: torch.Tensor, bad: dict[int, str], failures: Failures
) -> Batch:
    """Return the batch of a job from images (N, C, S, S); bad: place in the batch -> reason.

    A bad image is invalid and never replaced by another's pixels.
    """
    for place, reason in bad.items():
        failures.record(reader.name(int(job.rows[place])), reason)
    valid = job.rows >= 0
    valid[list(bad)] = False
    targets = np.where(valid, reader.targets[job.rows], 0)
    return Batch(
        images, torch.from_numpy(targets), torch.from_numpy(job.rows), torch.from_numpy(valid)
    )


class MemoryReader:
    """Images held in memory, uint8 (N, H, W, C); made in the calling thread."""

    notes: tuple[str, ...] = ()

    def __init__(
        self, images: np.ndarray, targets: np.ndarray, classes: tuple[str, ...], source: str
    ) -> None:
        self.images, self.targets, self.classes, self.source = images, targets, classes, source
        self.channels = images.shape[3]

    def stream(
        self, jobs: Iterable[Job], view: View, failures: Failures, each_second=nothing
    ) -> Iterator[Batch]:
        for job in jobs:
            yield self.read(job, view, failures)

    def read(self, job: Job, view: View, failures: Failures) -> Batch:
        images = self.images[job.rows]
        images[job.rows < 0] = 0
        images = torch.from_numpy(view.finish(images, job.keys, job.size))
        return assemble(self, job, images, {}, failures)

    def name(self, row: int) -> str:
        return f"image {row}"

    def fingerprint(self, rows: np.ndarray) -> str:
        return fingerprint("pixels of images", self.images[rows])


class _Pending(NamedTuple):
    job: Job
    images: np.ndarray
    status: np.ndarray
    tasks: list[Future]


class BetonReader:
    """A .beton file, read by FFCV's decoder in loader.workers threads (at least one).

    source: what the file was made of, if that is what the user gave. pin: batches lie in
    page-locked memory where there is a GPU to copy them to.
    """

    def __init__(
        self,
        samples: Samples,
        classes: tuple[str, ...],
        loader: LoaderSpec,
        source: str | None = None,
        notes: tuple[str, ...] = (),
        pin: bool = True,
    ) -> None:
        self.samples, self.classes, self.loader, self.notes = samples, classes, loader, notes
        self.workers = max(1, loader.workers)
        self.pin = pin and torch.cuda.is_available()
        self.targets, self.channels = samples.target, samples.channels
        self.source = source or str(samples.path)
        self.file = map_file(samples.path)
        self.decode = decoder()
        self.scratch_size = 3 * int((samples.height.astype(np.int64) * samples.width).max())

    def stream(
        self, jobs: Iterable[Job], view: View, failures: Failures, each_second=nothing
    ) -> Iterator[Batch]:
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="beton")

        def finish() -> Batch:
            first = pending.popleft()
            wait(lambda seconds: _done(first.tasks, seconds), self.loader, self.source, each_second)
            return self._finish(first, view, failures)

        try:
            for job in jobs:
                pending.append(self._submit(pool, job, view))
                if len(pending) > self._ahead(len(pending[0].tasks)):
                    yield finish()
            while pending:
                yield finish()
        finally:
            # Not waiting: a thread may hang in a read that never returns.
            pool.shutdown(wait=False, cancel_futures=True)

    def read(self, job: Job, view: View, failures: Failures) -> Batch:
        return next(self.stream([job], view, failures))

    def _ahead(self, tasks: int) -> int:
        """Return how many batches of so many tasks to begin before they are asked for."""
        if self.loader.prefetch is not None:
            return self.loader.prefetch
        return max(BATCHES_AHEAD, TASKS_AHEAD_PER_WORKER * self.workers // tasks)

    def _submit(self, pool: ThreadPoolExecutor, job: Job, view: View) -> _Pending:
        height, width = self.samples.height[job.rows], self.samples.width[job.rows]
        boxes, flips = view.boxes(job.keys, height, width), view.flips(job.keys)
        side = (job.size, job.size) if self.channels == 3 else (int(height[0]), int(width[0]))
        shape = (len(job.rows), *side, self.channels)
        # A fresh buffer each time: nothing that was handed out is written again.
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin).numpy()
        status = np.zeros(len(job.rows), dtype=np.int64)
        length = min(IMAGES_PER_TASK, math.ceil(len(job.rows) / self.workers))
        columns = (job.rows, boxes, flips, images, status)
        tasks = [
            pool.submit(self._decode, *(column[start : start + length] for column in columns))
            for start in range(0, len(job.rows), length)
        ]
        return _Pending(job, images, status, tasks)

    def _decode(self, rows, boxes, flips, images, status) -> None:
        s = self.samples
        stored = (self.file, s.mode, s.height, s.width, s.pointer, s.size, s.sums)
        scratch = np.empty(self.scratch_size, dtype=np.uint8)
        self.decode(stored, rows, boxes, flips, scratch, images, status)

    def _finish(self, pending: _Pending, view: View, failures: Failures) -> Batch:
        for task in pending.tasks:
            task.result()
        bad = {
            int(place): REASONS[int(pending.status[place])]
            for place in np.flatnonzero(pending.status != GOOD)
        }
        images = torch.from_numpy(view.finish(pending.images, pending.job.keys, pending.job.size))
        return assemble(self, pending.job, images, bad, failures)

    def name(self, row: int) -> str:
        return f"{self.samples.path}: image {row}"

    def fingerprint(self, rows: np.ndarray) -> str:
        """Of the checksums of the images; of a file without them, of the images' sizes."""
        s = self.samples
        if len(s.sums):
            return fingerprint("sums of images", s.sums[rows])
        return fingerprint("sizes of images", s.size[rows], s.height[rows], s.width[rows])


def _done(tasks: list[Future], seconds: float) -> bool | None:
    """Return True once all tasks are done, None if they are not after `seconds`."""
    return None if futures.wait(tasks, seconds).not_done else True
