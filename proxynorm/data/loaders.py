"""The loaders: they choose the samples of each batch and process, and their order."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from proxynorm.data.augment import Transform
from proxynorm.data.randomness import permutation, sample_keys
from proxynorm.data.readers import Decoded, Job, Reader, do_nothing
from proxynorm.data.spec import Batch, DataInfo, DataSpec
from proxynorm.errors import ConfigError, DataError

STAND_INS_TRIED = 1000  # damaged images in a row that end a run, even under on_bad=skip


@dataclass(frozen=True)
class Split:
    """A reader, and some of its rows, int64 (N,)."""

    reader: Reader
    rows: np.ndarray


@dataclass
class Data:
    """An opened data set, as open_data returns it.

    warnings: for the user, one line each; failures: the damaged images that this process has found
    under on_bad="skip", name -> reason.
    """

    spec: DataSpec
    info: DataInfo
    train: Split
    evaluation: Split
    warnings: tuple[str, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.transform = Transform(self.spec, tuple(round(255 * value) for value in self.info.mean))
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        for reader in (self.train.reader, self.evaluation.reader):
            for name, reason in reader.skipped.items():
                self._note_damage(name, reason)

    def _note_damage(self, name: str, reason: str) -> None:
        """Add a damaged image to failures. Raises DataError under on_bad="raise"."""
        if self.spec.on_bad == "raise":
            raise DataError(
                f"{name}: {reason}; repair it (a .beton file: write it again), or set "
                "data.on_bad=skip (eval.py: on_bad=skip)"
            )
        self.failures[name] = reason

    @property
    def backend(self) -> str:
        """The backend that reads the images: "ffcv", "torchvision" or "memory"."""
        return self.train.reader.backend

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the images of "train" and "eval": see Reader.fingerprint."""
        return {part: split.reader.fingerprint(split.rows) for part, split in self._splits.items()}

    def replaced(self, stored: dict[str, str]) -> dict[str, str]:
        """Return part -> source of the parts whose images do not match `stored` fingerprints."""
        return {
            part: split.reader.source
            for part, split in self._splits.items()
            if self.comparable(stored, part) and stored[part] != self.fingerprints[part]
        }

    def comparable(self, stored: dict[str, str], part: str) -> bool:
        """Return whether `stored` has a fingerprint of the part that can be compared.

        It has none if the images were read in another way, such as a folder then and a .beton now.
        """
        return stored.get(part, "").startswith(self.fingerprints[part].partition(":")[0] + ":")

    @property
    def _splits(self) -> dict[str, Split]:
        return {"train": self.train, "eval": self.evaluation}

    def train_loader(
        self, batch: int, micro_batch: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> TrainLoader:
        """Return training batches: `batch` images a step over all processes, micro_batch a forward.

        Step t of an epoch takes the images t*batch…(t+1)*batch of the epoch's order, for any number
        of processes. Raises ConfigError if batch is not a multiple of world_size * micro_batch or
        exceeds the training set.
        """
        return TrainLoader(self, batch, micro_batch, seed, rank, world_size)

    def eval_loader(
        self,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        each_second: Callable[[], None] = do_nothing,
    ) -> Iterator[Batch]:
        """Yield evaluation batches, the same number on every rank.

        Over all ranks, each image is valid in exactly one row.
        """
        if batch_size < 1:
            raise ConfigError(f"evaluation batch size {batch_size}: give at least 1")
        rows, size = self.evaluation.rows, self.spec.eval_size or self.spec.image_size
        # At most a rank's share, so that batches of a small set are not mostly padding.
        batch_size = min(batch_size, math.ceil(len(rows) / world_size))
        count = math.ceil(len(rows) / (batch_size * world_size))
        padded = np.full(count * world_size * batch_size, -1)
        padded[: len(rows)] = rows
        share = padded.reshape(count, world_size, batch_size)[:, rank]
        keys = np.zeros(batch_size, dtype=np.uint64)  # evaluation draws nothing
        jobs = (Job(part, keys, size) for part in share)
        reader = self.evaluation.reader
        for decoded in reader.stream(jobs, self.transform.for_evaluation(), each_second):
            yield self.to_batch(reader, decoded)

    def to_batch(self, reader: Reader, decoded: Decoded) -> Batch:
        """Return a job's batch, with damaged images marked invalid."""
        job, images, bad = decoded
        for index, reason in bad.items():
            self._note_damage(reader.name(int(job.rows[index])), reason)
        valid = job.rows >= 0
        valid[list(bad)] = False
        targets = np.where(valid, reader.targets[job.rows], 0)
        return Batch(images, *map(torch.from_numpy, (targets, job.rows, valid)))

    def prepare(
        self,
        batch: Batch,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Batch:
        """Move images and targets to the device; normalize there: (x / 255 - mean) / std.

        Returns images (N, C, H, W) of dtype; indices and valid stay on the host.
        """
        images, targets, indices, valid = batch
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        scale, offset = self._constants(images.device)
        out = torch.empty(images.shape, dtype=dtype, device=device, memory_format=memory_format)
        # One kernel, from bytes to the type of the computation.
        torch.addcmul(offset, images, scale, out=out)
        return Batch(out, targets, indices, valid)

    def _constants(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and offset of the normalization, (1, C, 1, 1).

        They stay on the device, because copying them would wait for it.
        """
        if device not in self._on_device:
            mean, std = (
                torch.tensor(value, dtype=torch.float64).view(1, -1, 1, 1)
                for value in (self.info.mean, self.info.std)
            )
            self._on_device[device] = tuple(
                value.float().to(device) for value in (1 / (255 * std), -mean / std)
            )
        return self._on_device[device]


@dataclass
class TrainLoader:
    """Training micro-batches; see Data.train_loader."""

    data: Data
    batch: int
    micro_batch: int
    seed: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        spec, self.reader, self.rows = self.data.spec, self.data.train.reader, self.data.train.rows
        self.crop_seed = self.seed if spec.deterministic else secrets.randbits(64)
        smallest = min(self.batch, self.micro_batch)
        if smallest < 1 or self.batch % (self.world_size * self.micro_batch):
            raise ConfigError(
                f"batch={self.batch} is not a multiple of {self.world_size} process(es) x "
                f"micro_batch={self.micro_batch}, each at least 1"
            )
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"batch={self.batch} exceeds the {len(self.rows)} training images; give a "
                "smaller batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Weight updates in an epoch. The images of a last, incomplete batch are left out."""
        return len(self.rows) // self.batch

    def image_size(self, epoch: int) -> int:
        """Return the side of the training crop in this epoch, pixels.

        It grows from start_size to image_size in multiples of 32 (ffcv-imagenet's recipe).
        """
        spec = self.data.spec
        if spec.ramp is None or epoch >= spec.ramp[1]:
            return spec.image_size
        if epoch <= spec.ramp[0]:
            return spec.start_size
        grown = np.interp(epoch, spec.ramp, (spec.start_size, spec.image_size))
        return min(max(round(grown / 32) * 32, spec.start_size), spec.image_size)

    def epoch(
        self, epoch: int, start_step: int = 0, each_second: Callable[[], None] = do_nothing
    ) -> Iterator[Batch]:
        """Yield the epoch's batches of micro_batch images from start_step on; seeking is free.

        Under on_bad="skip", a batch lacks its damaged images. If all are damaged, the next sound
        image of the epoch takes their place. each_second is called while waiting for a batch.
        """
        order = self.rows[permutation(self.seed, epoch, len(self.rows))]
        # A rank takes a contiguous part of each step: the step is the same for any number of ranks.
        used = order[: self.steps_per_epoch * self.batch]
        steps = used.reshape(self.steps_per_epoch, self.world_size, -1, self.micro_batch)
        share = steps[start_step:, self.rank].reshape(-1, self.micro_batch)
        jobs = (self._job(rows, epoch) for rows in share)
        for decoded in self.reader.stream(jobs, self.data.transform, each_second):
            batch = self.data.to_batch(self.reader, decoded)
            yield _only_valid(batch) or self._stand_in(order, batch, epoch)

    def _job(self, rows: np.ndarray, epoch: int) -> Job:
        return Job(rows, sample_keys(self.crop_seed, epoch, rows), self.image_size(epoch))

    def _stand_in(self, order: np.ndarray, batch: Batch, epoch: int) -> Batch:
        """Return the next sound image, as a batch to replace one of damaged images only.

        An empty batch would have no mean loss, and no process may skip a backward pass. The choice
        depends on the order alone, so a resumed run makes the same one.
        """
        data, reader = self.data, self.reader
        place = int(np.flatnonzero(order == int(batch.indices[-1]))[0]) + 1
        for row in np.roll(order, -place)[:STAND_INS_TRIED]:
            decoded = reader.decode(self._job(np.array([row]), epoch), data.transform)
            if found := _only_valid(data.to_batch(reader, decoded)):
                return found
        raise DataError(
            f"{reader.source}: {min(STAND_INS_TRIED, len(order))} images in a row are damaged "
            f"(such as {next(reversed(data.failures))}); repair the images"
        )


def _only_valid(batch: Batch) -> Batch | None:
    """Return the valid images of a batch, or None if it has none."""
    if bool(batch.valid.all()):
        return batch
    return Batch(*(part[batch.valid] for part in batch)) if bool(batch.valid.any()) else None


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches with their images (still uint8) and targets on the device.

    A GPU copies the next batch while it computes on the current one.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            # Pinning costs nothing if the reader has pinned the images already.
            parts = [part.pin_memory().to(device, non_blocking=True) for part in batch[:2]]
            copied = stream.record_event()
        if ahead is not None:
            yield _after_copy(*ahead)
        ahead = Batch(*parts, *batch[2:]), copied
    if ahead is not None:
        yield _after_copy(*ahead)


def _after_copy(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Make the current stream wait for the copy, and keep the memory until it has used it."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    batch.images.record_stream(current)
    batch.targets.record_stream(current)
    return batch
