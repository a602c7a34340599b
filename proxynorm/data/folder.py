"""The torchvision backend's reader of image files: torch's DataLoader around PIL."""

from __future__ import annotations

import math
import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from proxynorm.data.augment import View
from proxynorm.data.images import BadImage, ImageRef, load_rgb
from proxynorm.data.readers import Failures, Job, assemble, fingerprint
from proxynorm.data.sources import Listing
from proxynorm.data.spec import Batch
from proxynorm.errors import ConfigError


class FolderReader:
    """Image files of the folder `source`, decoded in `workers` processes (0: in this one), one
    micro-batch at a time in each; prefetch: see LoaderSpec."""

    channels = 3

    def __init__(
        self, listing: Listing, source: str, workers: int, prefetch: int | None = None
    ) -> None:
        self.source = source
        self.classes, self.targets, self.workers = listing.classes, listing.targets, workers
        ahead = prefetch is not None and workers > 0
        self.prefetch_factor = max(1, math.ceil(prefetch / workers)) if ahead else None
        # One block of bytes, so that worker processes share it instead of copying a million
        # strings.
        self.paths = np.array([os.fsencode(image.path) for image in listing.images])

    def stream(self, jobs: Iterable[Job], view: View, failures: Failures) -> Iterator[Batch]:
        with warnings.catch_warnings():
            # How many processes read is the user's choice: they may wait for a disk, not for a
            # core.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = torch.utils.data.DataLoader(
                _Decoder(self.paths, view),
                batch_size=None,
                sampler=jobs,
                num_workers=self.workers,
                prefetch_factor=self.prefetch_factor,
                collate_fn=_unchanged,
                pin_memory=torch.cuda.is_available(),
                # Its own generator: DataLoader would otherwise draw from the one that dropout uses.
                generator=torch.Generator(),
            )
            batches = iter(loader)
        for job, images, bad in batches:
            yield assemble(self, job, images, bad, failures)

    def name(self, row: int) -> str:
        return os.fsdecode(self.paths[row])

    def fingerprint(self, rows: np.ndarray) -> str:
        """Of every file's name, and of the length and two blocks of at most MOST files, evenly
        spaced: all would take minutes."""
        paths = self.paths[rows].tolist()
        names = b"\0".join(os.path.basename(path) for path in paths)
        parts = b"".join(_extract(path) for path in paths[:: math.ceil(len(paths) / MOST)])
        return fingerprint("extracts of files", np.frombuffer(names + parts, np.uint8))


MOST, BLOCK = 10_000, 4096


def _extract(path: bytes) -> bytes:
    """A file's length, and BLOCK bytes of its middle and of its end; of a file that is gone,
    nothing."""
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            places = (max(0, (length - BLOCK) // 2), max(0, length - BLOCK))
            return length.to_bytes(8, "little") + b"".join(
                os.pread(file.fileno(), BLOCK, place) for place in places
            )
    except OSError:
        return b""


def _unchanged(result):
    return result


class _Decoder(torch.utils.data.Dataset):
    """Job -> (job, images uint8 (N, C, S, S), place -> reason of the bad ones); runs in the worker
    processes."""

    def __init__(self, paths: np.ndarray, view: View) -> None:
        self.paths, self.view = paths, view

    def __getitem__(self, job: Job) -> tuple[Job, torch.Tensor, dict[int, str]]:
        images = np.zeros((len(job.rows), job.size, job.size, 3), dtype=np.uint8)
        bad = {}
        for place in np.flatnonzero(job.rows >= 0):
            path = os.fsdecode(self.paths[job.rows[place]])
            try:
                image = load_rgb(ImageRef(path, path))
            except BadImage as reason:
                bad[int(place)] = str(reason)
            else:
                images[place] = self._transform(image, job.keys[place : place + 1], job.size)
        return job, torch.from_numpy(self.view.finish(images, job.keys, job.size)), bad

    def _transform(self, image: Image.Image, key: np.ndarray, size: int) -> Image.Image:
        width, height = image.size
        top, left, h, w = self.view.boxes(key, np.array([height]), np.array([width]))[0].tolist()
        image = image.resize(
            (size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
        )
        if self.view.flips(key)[0]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.view.randaugment is not None:
            with _seeded(int(key[0])):
                image = rand_augment(self.view.randaugment, self.view.colour)(image)
        return image


def rand_augment(config: str, colour: tuple[int, ...]):
    """timm's RandAugment for a configuration string such as "rand-m9-mstd0.5"; colour fills what
    moves in.

    Raises ConfigError if timm does not take the string, or would pass over a part of it.
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
            f"rand-m9-n2-mstd0.5 (timm: m, n, p, mstd, "
            "mmax, inc with a number; t with a set's name)"
        ) from None


# timm passes over a section without a number.
SECTION = re.compile(r"t[a-z]+|[a-z]+\d.*")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that timm's augmentations use, and put them back."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
