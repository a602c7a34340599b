"""The loaders: which samples, in which order, to which process; on top of any reader."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from proxynorm.data.augment import View
from proxynorm.data.randomness import evaluation_batches, micro_batches, permutation, sample_keys
from proxynorm.data.readers import Failures, Job, Reader
from proxynorm.data.spec import Batch, DataInfo, DataSpec
from proxynorm.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """Some rows, int64 (N,), of a reader."""

    reader: Reader
    rows: np.ndarray


class TrainLoader:
    """Training micro-batches; see Data.train_loader."""

    def __init__(
        self, split: Split, view: View, spec: DataSpec, failures: Failures, **order: int
    ) -> None:
        self.split, self.view, self.spec, self.failures = split, view, spec, failures
        self.batch, self.micro_batch, self.seed = (
            order["batch"],
            order["micro_batch"],
            order["seed"],
        )
        self.rank, self.world_size = order["rank"], order["world_size"]
        self.crop_seed = self.seed if spec.deterministic else secrets.randbits(64)
        self.running: list[Iterator[Batch]] = []
        self._check()

    def _check(self) -> None:
        count, step = len(self.split.rows), self.world_size * self.micro_batch
        if min(self.batch, self.micro_batch) < 1:
            raise ConfigError(
                f"batch={self.batch} micro_batch={self.micro_batch}: both must be at least 1"
            )
        if self.batch % step:
            raise ConfigError(
                f"batch={self.batch} is not divisible by {self.world_size} process(es) x "
                f"micro_batch={self.micro_batch}"
            )
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"batch={self.batch} exceeds the {count} training images; give a smaller batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Weight updates in an epoch; the images of a last, partial batch are left out."""
        return len(self.split.rows) // self.batch

    def image_size(self, epoch: int) -> int:
        """Side of the training crop in this epoch, pixels; a multiple of 32 on the way
        (ffcv-imagenet's recipe)."""
        spec = self.spec
        if spec.ramp is None or epoch >= spec.ramp[1]:
            return spec.image_size
        grown = np.interp(epoch, spec.ramp, (spec.start_size, spec.image_size))
        return spec.start_size if epoch <= spec.ramp[0] else round(grown / 32) * 32

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The epoch's batches of micro_batch images, from start_step on; seeking costs nothing.

        Under on_bad="skip" a batch lacks its damaged images and is smaller by them.
        """
        order = self.split.rows[permutation(self.seed, epoch, len(self.split.rows))]
        jobs = (
            Job(rows, sample_keys(self.crop_seed, epoch, rows), self.image_size(epoch))
            for rows in micro_batches(
                order, self.batch, self.micro_batch, start_step, self.rank, self.world_size
            )
        )
        stream = self.split.reader.stream(jobs, self.view, self.failures)
        self.running.append(stream)
        try:
            for batch in stream:
                yield _only_valid(batch)
        finally:
            stream.close()
            self.running.remove(stream)

    def close(self) -> None:
        """End every epoch that was left early, with its threads and processes."""
        for stream in list(self.running):
            stream.close()


def _only_valid(batch: Batch) -> Batch:
    if bool(batch.valid.all()):
        return batch
    if not bool(batch.valid.any()):
        raise DataError(
            "every image of a micro-batch is damaged; see the list of skipped images, and "
            "prepare the data again"
        )
    return Batch(*(part[batch.valid] for part in batch))


class EvalLoader:
    """Evaluation batches with a mask; see Data.eval_loader."""

    def __init__(
        self,
        split: Split,
        view: View,
        size: int,
        failures: Failures,
        batch_size: int,
        rank: int,
        world: int,
    ):
        if batch_size < 1:
            raise ConfigError(f"evaluation batch size {batch_size}: give at least 1")
        # No larger than a rank's share, so that a small set is not mostly padding.
        batch_size = min(batch_size, math.ceil(len(split.rows) / world))
        self.split, self.view, self.size, self.failures = split, view, size, failures
        self.batch_size, self.rank, self.world_size = batch_size, rank, world

    def __len__(self) -> int:
        return math.ceil(len(self.split.rows) / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        stream = self.split.reader.stream(self._jobs(), self.view, self.failures)
        try:
            yield from stream
        finally:
            stream.close()

    def _jobs(self) -> Iterator[Job]:
        count = len(self.split.rows)
        for positions in evaluation_batches(count, self.batch_size, self.rank, self.world_size):
            rows = np.where(positions >= 0, self.split.rows[positions], -1)
            yield Job(rows, np.zeros(len(rows), dtype=np.uint64), self.size)


class Data:
    """An opened data set: what open_data returns.

    info: DataInfo; backend: "ffcv" or "torchvision"; failures: the damaged images met so far, name
    -> reason;
    warnings: what the user should be told when it is opened, one line each.
    """

    def __init__(
        self,
        spec: DataSpec,
        info: DataInfo,
        backend: str,
        train: Split,
        evaluation: Split,
        failures: Failures,
        warnings: tuple[str, ...] = (),
    ):
        self.spec, self.info, self.backend, self.warnings = spec, info, backend, warnings
        self.train, self.evaluation, self._failures = train, evaluation, failures
        colour = tuple(round(255 * value) for value in info.mean)
        self._train_view = View(
            spec.augmentation,
            spec.eval_ratio,
            spec.padding,
            spec.min_area,
            spec.flip,
            spec.random_erasing,
            colour,
            spec.randaugment,
        )
        self._eval_view = View(ratio=spec.eval_ratio)
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells the images of "train" and "eval" from others, whatever their number and
        labels: see Reader."""
        return {part: split.reader.fingerprint(split.rows) for part, split in self._splits.items()}

    def replaced(self, stored: dict[str, str]) -> dict[str, str]:
        """Of "train" and "eval" those whose images are not the ones of the fingerprints `stored`,
        with their file or folder."""
        return {
            part: split.reader.source
            for part, split in self._splits.items()
            if self.comparable(stored, part) and stored[part] != self.fingerprints[part]
        }

    def comparable(self, stored: dict[str, str], part: str) -> bool:
        """Whether the fingerprints `stored` have one of this kind: not where the images were read
        in another way, from a folder, say, and now from a .beton file."""
        kinds = (prints.get(part, "").partition(":")[0] for prints in (stored, self.fingerprints))
        return len(set(kinds)) == 1

    @property
    def _splits(self) -> dict[str, Split]:
        return {"train": self.train, "eval": self.evaluation}

    @property
    def failures(self) -> dict[str, str]:
        """Damaged images met by this process under on_bad="skip": name -> reason."""
        return dict(self._failures.reasons)

    def train_loader(
        self, batch: int, micro_batch: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> TrainLoader:
        """Training batches: `batch` images a step over all processes, micro_batch a forward pass.

        Step t of an epoch takes the images t*batch…(t+1)*batch of the epoch's order, whatever the
        number of processes. Raises ConfigError if batch is no multiple of world_size * micro_batch,
        or larger than the training set.
        """
        order = {
            "batch": batch,
            "micro_batch": micro_batch,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
        }
        return TrainLoader(self.train, self._train_view, self.spec, self._failures, **order)

    def eval_loader(self, batch_size: int, rank: int = 0, world_size: int = 1) -> EvalLoader:
        """Evaluation batches: equally many on every rank; over all ranks each image is valid in
        exactly one row."""
        size = self.spec.eval_size or self.spec.image_size
        return EvalLoader(
            self.evaluation, self._eval_view, size, self._failures, batch_size, rank, world_size
        )

    def prepare(
        self,
        batch: Batch,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Batch:
        """Return the batch with targets and images on the device, the images normalized there:
        (N, C, H, W) of `dtype`, (x / 255 - mean) / std. indices and valid stay on the host."""
        images, targets, indices, valid = batch
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        scale, offset = self._constants(images.device)
        made = torch.empty(images.shape, dtype=dtype, device=device, memory_format=memory_format)
        # One kernel, from bytes to the type of the computation.
        torch.addcmul(offset, images, scale, out=made)
        return Batch(made, targets, indices, valid)

    def _constants(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Factor and summand of the normalization, (1, C, 1, 1); kept on the device, as copying
        them waits for it."""
        if device not in self._on_device:
            mean, std = (
                torch.tensor(value, dtype=torch.float64).view(1, -1, 1, 1)
                for value in (self.info.mean, self.info.std)
            )
            self._on_device[device] = tuple(
                value.float().to(device) for value in (1 / (255 * std), -mean / std)
            )
        return self._on_device[device]


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches with images, still bytes, and targets on the device.

    A GPU copies the next batch while it computes on this one.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            # Pinning costs nothing where the reader has pinned already.
            parts = [part.pin_memory().to(device, non_blocking=True) for part in batch[:2]]
            copied = stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = Batch(*parts, *batch[2:]), copied
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Make the computation wait for the copy, on the device, and keep the memory until both end."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    batch.images.record_stream(current)
    batch.targets.record_stream(current)
    return batch
