"""The registry of data sets: how each is opened, and how its images are normalized.

A new data set is an opener and an entry in DATASETS here, and a file configs/data/NAME.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from proxynorm.data import fashion_mnist
from proxynorm.data.cache import cache_folder, cached_beton
from proxynorm.data.ffcv.beton import RAW, Samples, new_beton, read_beton
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.ffcv.verification import verify
from proxynorm.data.folder import FolderReader
from proxynorm.data.images import StorageOptions
from proxynorm.data.readers import BetonReader, Failures, MemoryReader, Reader
from proxynorm.data.sources import Listing, list_folder
from proxynorm.data.spec import DataSpec, LoaderSpec
from proxynorm.errors import ConfigError, DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Called with the spec, the backend ("ffcv" or "torchvision"), the loader and the failures;
# returns the readers of the training and of the evaluation images.
Opener = Callable[[DataSpec, str, LoaderSpec, Failures], tuple[Reader, Reader]]


class DataSet(NamedTuple):
    """An entry of the registry.

    mean, std: per channel on the 0..1 scale, unless the user gives others. needs_root: the user
    must say where the images are.
    """

    open: Opener
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    needs_root: bool = True


def _open_fashion_mnist(
    spec: DataSpec, backend: str, loader: LoaderSpec, failures: Failures
) -> tuple[Reader, Reader]:
    _check_fashion_mnist(spec)
    cache = cache_folder(spec.cache)
    folder = fashion_mnist.find_fashion_mnist(spec.root, cache)
    train, evaluation = (
        _fashion_mnist_reader(folder, part, cache, backend, loader) for part in fashion_mnist.COUNTS
    )
    return train, evaluation


def _check_fashion_mnist(spec: DataSpec) -> None:
    """Raise ConfigError on what images of one channel and 28 pixels do not allow."""
    if spec.augmentation == "inception":
        raise ConfigError(
            "data.augmentation=inception is for photographs; Fashion-MNIST takes pad_crop or none"
        )
    if spec.randaugment is not None:
        raise ConfigError(
            "randaugment is for photographs in colour (data=folder); Fashion-MNIST has none"
        )
    sides = (spec.image_size, spec.eval_size or spec.image_size, spec.start_size or spec.image_size)
    if min(sides) < fashion_mnist.SIDE:
        raise ConfigError(
            f"Fashion-MNIST's images are {fashion_mnist.SIDE} pixels wide and are padded, not "
            f"shrunk: give data.image_size and data.eval_size of at least {fashion_mnist.SIDE}"
        )


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
    parts = ((train, "train"), (evaluation, "val"))
    return tuple(
        folder_reader(spec, root / part, listing, backend, loader, failures)
        for listing, part in parts
    )


def folder_reader(
    spec: DataSpec,
    folder: Path,
    listing: Listing,
    backend: str,
    loader: LoaderSpec,
    failures: Failures,
) -> Reader:
    """Return the reader of a folder's images by either backend."""
    if backend == "torchvision":
        return FolderReader(listing, str(folder), loader.workers, loader.prefetch)
    samples = _converted(spec, folder.name, listing, loader.workers)
    for name, reason in samples.manifest["skipped"].items():
        failures.record(name, reason)
    return BetonReader(
        samples, listing.classes, loader.workers, loader.prefetch, source=str(folder)
    )


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


DATASETS = {
    "fashion_mnist": DataSet(
        _open_fashion_mnist, fashion_mnist.MEAN, fashion_mnist.STD, needs_root=False
    ),
    "folder": DataSet(_open_folder),
    "beton": DataSet(_open_beton),
}
