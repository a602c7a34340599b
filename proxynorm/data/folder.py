"""The torchvision backend: reads image files with Pillow in the processes of torch's DataLoader."""

from __future__ import annotations

import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from proxynorm.cli import first_line
from proxynorm.data.augment import Transform
from proxynorm.data.images import ImageRef, load_rgb
from proxynorm.data.randomness import seeded
from proxynorm.data.readers import POLL_SECONDS, Decoded, Job, Reader, do_nothing, fingerprint_of
from proxynorm.data.sources import Listing, printable
from proxynorm.data.spec import LoaderSpec
from proxynorm.errors import ConfigError, DataError

END = "end"  # of the stream; None stands for a timeout
SHARED_MEMORY = "/dev/shm"
# A fingerprint reads two blocks of BLOCK bytes from each of about FILES_READ files.
FILES_READ, BLOCK = 10_000, 4096
# Sections of a RandAugment string. timm ignores those without a number.
SECTION = re.compile(r"t[a-z]+|[a-z]+\d.*")


class FolderReader(Reader):
    """Reads image files in loader.workers processes, a micro-batch each (0: in this process)."""

    backend = "torchvision"

    def __init__(self, listing: Listing, loader: LoaderSpec) -> None:
        super().__init__(str(listing.source), listing.classes, listing.targets)
        self.loader, self.notes = loader, listing.notes
        # One array, which worker processes share. A list of a million strings would be copied.
        self.paths = np.array([os.fsencode(image.path) for image in listing.images])

    def stream(
        self,
        jobs: Iterable[Job],
        transform: Transform,
        each_second: Callable[[], None] = do_nothing,
    ) -> Iterator[Decoded]:
        if not self.loader.workers:
            yield from super().stream(jobs, transform)
            return
        batches = self._worker_batches(jobs, transform)
        while (result := self.wait(lambda: _next_in_time(batches), each_second)) is not END:
            if isinstance(result, DataError):
                raise result
            yield result

    def _worker_batches(
        self, jobs: Iterable[Job], transform: Transform
    ) -> Iterator[Decoded | DataError]:
        prefetch, workers = self.loader.prefetch, self.loader.workers
        with warnings.catch_warnings():
            # More processes than cores are the user's choice: they may be waiting for a disk.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                _Decoder(self.paths, transform),
                batch_size=None,
                sampler=jobs,
                num_workers=workers,
                prefetch_factor=None if prefetch is None else max(1, math.ceil(prefetch / workers)),
                collate_fn=_to_shared_memory,
                pin_memory=torch.cuda.is_available(),
                # Otherwise DataLoader would draw from the generator that dropout uses.
                generator=torch.Generator(),
                timeout=POLL_SECONDS,
            )
            return iter(loader)

    def decode(self, job: Job, transform: Transform) -> Decoded:
        return _Decoder(self.paths, transform)[job]

    def name(self, row: int) -> str:
        return printable(bytes(self.paths[row]))

    def fingerprint(self, rows: np.ndarray) -> str:
        """Cover all files' names and parts of FILES_READ files: reading all would take minutes."""
        paths = self.paths[rows].tolist()
        names = b"\0".join(os.path.basename(path) for path in paths)
        every = math.ceil(len(paths) / FILES_READ)
        parts = b"".join(_extract(path) for path in paths[::every])
        return fingerprint_of("extracts of files", np.frombuffer(names + parts, np.uint8))


def _extract(path: bytes) -> bytes:
    """Return a file's length and BLOCK bytes of its middle and of its end; b"" if unreadable."""
    if not os.path.isfile(path):  # opening a named pipe would wait for its writer forever
        return b""
    try:
        with open(path, "rb") as file:
            length = os.stat(path).st_size
            offsets = max(0, (length - BLOCK) // 2), max(0, length - BLOCK)
            blocks = [os.pread(file.fileno(), BLOCK, offset) for offset in offsets]
            return b"".join([length.to_bytes(8, "little"), *blocks])
    except OSError:
        return b""


def _next_in_time(results: Iterator[Decoded | DataError]) -> Decoded | DataError | str | None:
    """Return DataLoader's next result, END after the last, or None after DataLoader's timeout."""
    try:
        return next(results, END)
    except RuntimeError as error:
        if "timed out" in str(error):  # the iterator can still be used
            return None
        raise DataError(
            f"a loader worker ended ({first_line(error)}), most likely for lack of memory; use "
            "fewer loader.workers, or a smaller batch or micro_batch"
        ) from None


def _to_shared_memory(decoded: Decoded) -> Decoded | DataError:
    """Move a worker's images to shared memory, through which they reach the main process.

    DataLoader's queue would do so too, but its thread drops the batch on an error, and the run
    would wait for it forever.
    """
    images = decoded.images
    try:
        images.share_memory_()
    except RuntimeError:
        free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
        return DataError(
            "shared memory is full: a loader worker cannot pass on a batch of "
            f"{images.numel() / 1e6:.1f} MB ({free / 1e6:.1f} MB are free in {SHARED_MEMORY}); "
            "enlarge it (docker run --shm-size=8g), or use loader.workers=0 or loader=ffcv"
        )
    return decoded


class _Decoder(Dataset):
    """Maps a job to its decoded images."""

    def __init__(self, paths: np.ndarray, transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, job: Job) -> Decoded:
        pixels = np.zeros((len(job.rows), job.size, job.size, 3), dtype=np.uint8)
        bad = {}
        for place in np.flatnonzero(job.rows >= 0):
            path = os.fsdecode(self.paths[job.rows[place]])
            try:
                image = load_rgb(ImageRef(path, path))
                pixels[place] = _crop(image, self.transform, job.keys[place : place + 1], job.size)
            except Exception as reason:  # BadImage, or MemoryError in cropping, for example
                bad[int(place)] = first_line(reason)
        images = torch.from_numpy(self.transform.finish(pixels, job.keys, job.size))
        return Decoded(job, images, bad)


def _crop(image: Image.Image, transform: Transform, key: np.ndarray, size: int) -> Image.Image:
    """Crop, resize, mirror and augment an image. key: its random stream, uint64 (1,)."""
    width, height = image.size
    top, left, h, w = transform.boxes(key, np.array([height]), np.array([width]))[0].tolist()
    box = (left, top, left + w, top + h)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if transform.flips(key)[0]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if transform.spec.randaugment is not None:
        with seeded(int(key[0])):
            image = rand_augment(transform.spec.randaugment, transform.colour)(image)
    return image


def rand_augment(config: str, colour: tuple[int, ...]):
    """Return timm's RandAugment for a string such as "rand-m9-mstd0.5"; colour fills gaps.

    Raises ConfigError if timm rejects the string or would ignore a part of it.
    """
    from timm.data.auto_augment import rand_augment_transform

    sections = config.split("-")
    try:
        if not all(SECTION.fullmatch(section) for section in sections[1:]):
            raise ValueError
        return rand_augment_transform(config, {"img_mean": colour, "translate_const": 100})
    except (AssertionError, ValueError, KeyError):
        raise ConfigError(
            f"regularization.randaugment={config}: give 'rand' and sections as in "
            "rand-m9-n2-mstd0.5 (timm: m, n, p, mstd, mmax, inc with a number; t with a set's name)"
        ) from None
