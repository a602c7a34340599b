"""open_data: from a DataSpec to an opened data set."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from proxynorm.data import fashion_mnist
from proxynorm.data.cache import cache_folder, cached_beton
from proxynorm.data.ffcv.beton import RAW, Samples, new_beton, read_beton
from proxynorm.data.ffcv.native import ffcv_available, ffcv_library
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.ffcv.verification import verify
from proxynorm.data.folder import FolderReader, rand_augment
from proxynorm.data.images import StorageOptions
from proxynorm.data.loaders import Data, Split
from proxynorm.data.randomness import permutation
from proxynorm.data.readers import BetonReader, Failures, MemoryReader, Reader
from proxynorm.data.sources import Listing, list_folder
from proxynorm.data.spec import DataInfo, DataSpec, LoaderSpec, check_specs
from proxynorm.errors import ConfigError, DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_data(spec: DataSpec, loader: LoaderSpec | None = None) -> Data:
    """Open a data set with the backend that `loader` names.

    Raises ConfigError on a value that cannot be meant and DataError on data that is missing or
    damaged, one line each.
    """
    loader = loader or LoaderSpec()
    check_specs(spec, loader)
    backend = choose_backend(spec, loader)
    if loader.workers is None:
        loader = replace(loader, workers=share_of_cores())
    if spec.randaugment is not None:
        rand_augment(spec.randaugment, (0, 0, 0))  # a mistake in it shows here, not in a worker
    failures = Failures(spec.on_bad)
    openers = {"fashion_mnist": _open_fashion_mnist, "folder": _open_folder, "beton": _open_beton}
    train, evaluation = openers[spec.name](spec, backend, loader, failures)
    train_split, eval_split = _splits(spec, train, evaluation)
    warnings = _warnings(spec, train, evaluation)
    mean, std = _normalization(spec, train.channels)
    info = DataInfo(
        spec.name,
        train.classes,
        train.channels,
        len(train_split.rows),
        len(eval_split.rows),
        mean,
        std,
    )
    return Data(spec, info, backend, train_split, eval_split, failures, warnings)


def _warnings(spec: DataSpec, train: Reader, evaluation: Reader) -> tuple[str, ...]:
    """What does not keep from training, but may not be what was meant; one line each."""
    lines, available = [], len(train.targets) - spec.holdout
    if spec.limit is not None and spec.limit > available:
        lines.append(
            f"data.limit={spec.limit} exceeds the {available} training images, which are all taken"
        )
    readers = (reader for reader in (train, evaluation) if isinstance(reader, BetonReader))
    bare = [str(reader.samples.path) for reader in readers if not reader.samples.manifest]
    if bare:
        lines.append(
            f"{', '.join(bare)}: no manifest, so classes, labels and later damage cannot be checked"
        )
    return tuple(lines)


def choose_backend(spec: DataSpec, loader: LoaderSpec) -> str:
    """Which of "ffcv" and "torchvision" serves the request. ConfigError if the one asked for
    cannot."""
    if loader.name == "torchvision":
        if spec.name == "beton":
            raise ConfigError(
                "loader.name=torchvision cannot read data.name=beton; use loader.name=ffcv or "
                "data.name=folder"
            )
        return "torchvision"
    if loader.name == "ffcv" or spec.name == "beton":
        ffcv_library()
        if spec.randaugment is not None:
            raise ConfigError(
                "regularization.randaugment works on image folders alone: give data=folder "
                "loader=torchvision"
            )
        return "ffcv"
    return "ffcv" if spec.randaugment is None and ffcv_available() else "torchvision"


def share_of_cores() -> int:
    """This process's share of the cores: those it may run on, over the processes torchrun or SLURM
    put on this node."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _splits(spec: DataSpec, train: Reader, evaluation: Reader) -> tuple[Split, Split]:
    """The rows to train and to evaluate on: limit from the front of a seeded shuffle, holdout from
    its end."""
    count = len(train.targets)
    if spec.holdout >= count:
        raise ConfigError(
            f"data.holdout={spec.holdout} leaves none of the {count} training images to train on"
        )
    shuffled = permutation(spec.limit_seed, 0, count)
    rest = count - spec.holdout
    rows = np.sort(shuffled[: min(spec.limit or rest, rest)])
    held_out = Split(train, np.sort(shuffled[rest:]))
    return Split(train, rows), held_out if spec.holdout else Split(
        evaluation, np.arange(len(evaluation.targets))
    )


def _normalization(spec: DataSpec, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    usual = (
        (fashion_mnist.MEAN, fashion_mnist.STD)
        if spec.name == "fashion_mnist"
        else (IMAGENET_MEAN, IMAGENET_STD)
    )
    mean, std = tuple(spec.mean or usual[0]), tuple(spec.std or usual[1])
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ConfigError(
            f"data.mean={list(mean)} data.std={list(std)}: give {channels} value(s) each, std "
            f"above 0"
        )
    return mean, std


def _open_fashion_mnist(
    spec: DataSpec, backend: str, loader: LoaderSpec, failures: Failures
) -> tuple[Reader, Reader]:
    sides = (spec.image_size, spec.eval_size or spec.image_size, spec.start_size or spec.image_size)
    if min(sides) < fashion_mnist.SIDE:
        raise ConfigError(
            f"Fashion-MNIST's images are {fashion_mnist.SIDE} pixels wide and are padded, not "
            f"shrunk: "
            f"give data.image_size and data.eval_size of at least {fashion_mnist.SIDE}"
        )
    cache = cache_folder(spec.cache)
    folder = fashion_mnist.find_fashion_mnist(spec.root, cache)
    train, evaluation = (
        _fashion_mnist_reader(folder, part, cache, backend, loader) for part in fashion_mnist.COUNTS
    )
    return train, evaluation


def _fashion_mnist_reader(
    folder: Path, part: str, cache: Path, backend: str, loader: LoaderSpec
) -> Reader:
    if backend == "torchvision":
        images, labels = fashion_mnist.read_fashion_mnist(folder, part)
        return MemoryReader(images[..., None], labels, fashion_mnist.CLASSES, f"{folder}/{part}")
    signature = f"{fashion_mnist.signature(folder)};{part}"
    samples = cached_beton(
        cache,
        f"fashion-mnist-{part}",
        signature,
        lambda path: _write_fashion_mnist(path, folder, part),
    )
    return BetonReader(
        samples, fashion_mnist.CLASSES, loader.workers, loader.prefetch, source=f"{folder}/{part}"
    )


def _write_fashion_mnist(path: Path, folder: Path, part: str) -> None:
    images, labels = fashion_mnist.read_fashion_mnist(folder, part)
    with new_beton(path, channels=1, capacity=len(images), shape=images.shape[1:]) as writer:
        for image, label in zip(images, labels):
            writer.add(image.reshape(-1), int(label), fashion_mnist.SIDE, fashion_mnist.SIDE, RAW)
        writer.close(
            {"classes": list(fashion_mnist.CLASSES), "count": len(images), "source": str(folder)},
            verify,
        )


def _open_folder(
    spec: DataSpec, backend: str, loader: LoaderSpec, failures: Failures
) -> tuple[Reader, Reader]:
    root = Path(spec.root).expanduser()
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; give data.root with train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    train, evaluation = (list_folder(root / part) for part in ("train", "val"))
    _same_classes(root, train.classes, evaluation.classes)
    if backend == "torchvision":
        folders = ((train, "train"), (evaluation, "val"))
        return tuple(
            FolderReader(part, str(root / name), loader.workers, loader.prefetch)
            for part, name in folders
        )
    readers = []
    for part, listing in (("train", train), ("val", evaluation)):
        samples = _converted(spec, part, listing, loader.workers)
        for name, reason in samples.manifest["skipped"].items():
            failures.record(name, reason)
        readers.append(
            BetonReader(
                samples, train.classes, loader.workers, loader.prefetch, source=str(root / part)
            )
        )
    return readers[0], readers[1]


def _converted(spec: DataSpec, part: str, listing: Listing, workers: int) -> Samples:
    """The .beton file of a folder, made once and kept in the cache as long as the folder's files
    stay as they are."""
    options = StorageOptions()
    stats = ((image.path, os.stat(image.path)) for image in listing.images)
    signature = "\n".join(
        [repr(options), *(f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats)]
    )
    return cached_beton(
        cache_folder(spec.cache),
        f"folder-{part}",
        signature,
        lambda path: prepare(listing, path, options, spec.on_bad, workers),
    )


def _open_beton(
    spec: DataSpec, backend: str, loader: LoaderSpec, failures: Failures
) -> tuple[Reader, Reader]:
    root = Path(spec.root).expanduser()
    train, evaluation = (read_beton(root / f"{part}.beton") for part in ("train", "val"))
    classes = [tuple(samples.manifest.get("classes", ())) for samples in (train, evaluation)]
    if all(classes):
        _same_classes(root, *classes)
    # A file without manifest, such as FFCV's own writer makes, does not name its classes.
    count = 1 + max(int(train.target.max()), int(evaluation.target.max()))
    names = classes[0] or classes[1] or tuple(map(str, range(count)))
    if count > len(names):
        raise DataError(
            f"{root}: holds the label {count - 1} but names only {len(names)} classes; write the "
            f"files again"
        )
    return tuple(
        BetonReader(part, names, loader.workers, loader.prefetch) for part in (train, evaluation)
    )


def _same_classes(root: Path, train: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    odd = sorted(set(train) ^ set(evaluation))
    if train != evaluation:
        where = "train" if odd and odd[0] in train else "val"
        raise DataError(
            f"{root}: train and val hold different classes "
            f"({odd[0] if odd else 'in another order'}, only in {where})"
        )
