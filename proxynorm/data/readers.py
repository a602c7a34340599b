"""The readers: each turns a stream of jobs into a stream of batches, in order, ahead of time where
it has workers."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch

from proxynorm.data.augment import View
from proxynorm.data.ffcv.beton import Samples
from proxynorm.data.ffcv.native import GOOD, REASONS, decoder, map_file
from proxynorm.data.spec import Batch
from proxynorm.errors import DataError

# Work begun ahead: some batches, and enough to keep every thread busy where the batches are small.
BATCHES_AHEAD = 3
TASKS_AHEAD_PER_WORKER = 2
IMAGES_PER_TASK = 8


class Job(NamedTuple):
    """A micro-batch to be made: rows of the store, int64 (N,), -1 for padding; the samples' keys,
    uint64 (N,); its side in pixels."""

    rows: np.ndarray
    keys: np.ndarray
    size: int


class Reader(Protocol):
    """Images and targets behind row numbers 0..len(targets)-1."""

    classes: tuple[str, ...]
    channels: int
    targets: np.ndarray
    source: str

    def stream(self, jobs: Iterable[Job], view: View, failures: Failures) -> Iterator[Batch]:
        """A batch per job, in order. Leaving early (closing the generator) ends the work that was
        begun ahead."""

    def name(self, row: int) -> str:
        """What to call the image in a message: its file, or its number in a file."""

    def fingerprint(self, rows: np.ndarray) -> str:
        """What tells the images of `rows`, int64 (N,), from others, as "kind:digest"; different
        kinds cannot be compared."""


def fingerprint(kind: str, *parts: np.ndarray) -> str:
    """A Reader's fingerprint: kind, and SHA-256 of the arrays' bytes, cut to 16 digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(np.ascontiguousarray(part))
    return f"{kind}:{state.hexdigest()[:16]}"


class Failures:
    """What happens on damaged images: "raise" stops the run, "skip" leaves them out and counts
    them, once per image."""

    def __init__(self, on_bad: str) -> None:
        self.on_bad = on_bad
        self.reasons: dict[str, str] = {}

    def record(self, name: str, reason: str) -> None:
        """Note a damaged image. Raises DataError under the policy "raise"."""
        if self.on_bad == "raise":
            raise DataError(
                f"{name}: {reason}; mend it (a .beton file: write it again), or set "
                f"data.on_bad=skip"
            )
        self.reasons[name] = reason


def assemble(
    reader: Reader, job: Job, images: torch.Tensor, bad: dict[int, str], failures: Failures
) -> Batch:
    """The batch of a job: images (N, C, S, S); bad: place in the batch -> reason. A bad image is
    invalid, never another's."""
    for place, reason in bad.items():
        failures.record(reader.name(int(job.rows[place])), reason)
    valid = job.rows >= 0
    valid[list(bad)] = False
    targets = np.where(valid, reader.targets[job.rows], 0)
    return Batch(
        images, torch.from_numpy(targets), torch.from_numpy(job.rows), torch.from_numpy(valid)
    )


class MemoryReader:
    """Images held in memory, uint8 (N, H, W, C), read from `source`; nothing beside the calling
    thread is needed."""

    def __init__(
        self, images: np.ndarray, targets: np.ndarray, classes: tuple[str, ...], source: str
    ) -> None:
        self.images, self.targets, self.classes, self.source = images, targets, classes, source
        self.channels = images.shape[3]

    def stream(self, jobs: Iterable[Job], view: View, failures: Failures) -> Iterator[Batch]:
        for job in jobs:
            images = self.images[job.rows]
            images[job.rows < 0] = 0
            images = torch.from_numpy(view.finish(images, job.keys, job.size))
            yield assemble(self, job, images, {}, failures)

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
    """A .beton file, read by FFCV's decoder in `workers` threads (at least one).

    source: what the file was made of, if not itself what the user gave. prefetch: see LoaderSpec.
    pin: batches lie in page-locked memory where there is a GPU to copy them to.
    """

    def __init__(
        self,
        samples: Samples,
        classes: tuple[str, ...],
        workers: int,
        prefetch: int | None = None,
        pin: bool = True,
        source: str | None = None,
    ) -> None:
        self.samples, self.classes, self.workers = samples, classes, max(1, workers)
        self.prefetch = prefetch
        self.pin = pin and torch.cuda.is_available()
        self.targets, self.channels, self.source = (
            samples.target,
            samples.channels,
            source or str(samples.path),
        )
        self.file = map_file(samples.path)
        self.decode = decoder()
        self.scratch_size = 3 * int((samples.height.astype(np.int64) * samples.width).max())

    def stream(self, jobs: Iterable[Job], view: View, failures: Failures) -> Iterator[Batch]:
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="beton")
        try:
            for job in jobs:
                pending.append(self._submit(pool, job, view))
                if len(pending) > self._ahead(len(pending[0].tasks)):
                    yield self._finish(pending.popleft(), view, failures)
            while pending:
                yield self._finish(pending.popleft(), view, failures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ahead(self, tasks: int) -> int:
        """How many batches of so many tasks to begin before they are asked for."""
        if self.prefetch is not None:
            return self.prefetch
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
        parts = [slice(start, start + length) for start in range(0, len(job.rows), length)]
        tasks = [
            pool.submit(
                self._decode, job.rows[part], boxes[part], flips[part], images[part], status[part]
            )
            for part in parts
        ]
        return _Pending(job, images, status, tasks)

    def _decode(self, rows, boxes, flips, images, status) -> None:
        s = self.samples
        scratch = np.empty(self.scratch_size, dtype=np.uint8)
        self.decode(
            self.file,
            rows,
            s.mode,
            s.height,
            s.width,
            s.pointer,
            s.size,
            s.sums,
            boxes,
            flips,
            scratch,
            images,
            status,
        )

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
        """Of the sums of the images' bytes; of a file without them, of the images' lengths and
        sides."""
        s = self.samples
        if len(s.sums):
            return fingerprint("sums of images", s.sums[rows])
        return fingerprint("sizes of images", s.size[rows], s.height[rows], s.width[rows])
