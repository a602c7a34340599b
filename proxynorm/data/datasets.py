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
from proxynorm.data.ffcv.beton import RAW, Samples, read_beton
from proxynorm.data.ffcv.preparation import prepare
from proxynorm.data.ffcv.verification import verify
from proxynorm.data.ffcv.writer import new_beton
from proxynorm.data.folder import FolderReader
from proxynorm.data.images import StorageOptions
from proxynorm.data.names import code_points, look_alike
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
    return tuple(
        _fashion_mnist_reader(folder, part, cache, backend, loader) for part in fashion_mnist.COUNTS
    )


def _check_fashion_mnist(spec: DataSpec) -> None:
    """Raise ConfigError for options that grey images of 28 pixels do not allow."""
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

    def make(path: Path) -> None:
        _write_fashion_mnist(path, folder, part)

    samples = cached_beton(cache, f"fashion-mnist-{part}", signature, make)
    return BetonReader(samples, fashion_mnist.CLASSES, loader, source=f"{folder}/{part}")


def _write_fashion_mnist(path: Path, folder: Path, part: str) -> None:
    images, labels = fashion_mnist.read_fashion_mnist(folder, part)
    with new_beton(path, len(images), images.shape[1:]) as writer:
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
    if not os.path.isdir(root):
        raise DataError(
            f"{root}: no such folder; give data.root with train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    parts = {part: list_folder(root / part) for part in ("train", "val")}
    _same_classes(root, *(listing.classes for listing in parts.values()))
    return tuple(
        folder_reader(spec, root / part, listing, backend, loader, failures)
        for part, listing in parts.items()
    )


def folder_reader(
    spec: DataSpec,
    folder: Path,
    listing: Listing,
    backend: str,
    loader: LoaderSpec,
    failures: Failures,
) -> Reader:
    """Return the reader of a folder's images by either backend.

    FFCV's converts them to a .beton file, kept in the cache while the images stay as they are.
    """
    if backend == "torchvision":
        return FolderReader(listing, str(folder), loader)
    options = StorageOptions()
    signature = "\n".join([repr(options), *(_file_signature(i.path) for i in listing.images)])
    samples = cached_beton(
        cache_folder(spec.cache),
        f"folder-{folder.name}",
        signature,
        lambda path: prepare(listing, path, options, spec.on_bad, loader.workers),
    )
    for name, reason in samples.manifest["skipped"].items():
        failures.record(name, reason)
    return BetonReader(samples, listing.classes, loader, str(folder), listing.notes)


def _file_signature(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError as error:  # such as a dangling link: preparation reports it
        return f"{path}:{error.errno}"
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def _open_beton(
    spec: DataSpec, backend: str, loader: LoaderSpec, failures: Failures
) -> tuple[Reader, Reader]:
    root = Path(spec.root).expanduser()
    parts = [read_beton(root / f"{part}.beton") for part in ("train", "val")]
    classes = [tuple(samples.manifest.get("classes", ())) for samples in parts]
    if all(classes):
        _same_classes(root, *classes)
    elif any(classes):
        bare = parts[0] if classes[1] else parts[1]
        refuse_other_order(bare.path, classes[0] or classes[1], "the other file")
    # A file without manifest, such as FFCV's own writer makes, does not name its classes.
    count = 1 + max(int(samples.target.max()) for samples in parts)
    names = classes[0] or classes[1] or tuple(map(str, range(count)))
    if count > len(names):
        raise DataError(
            f"{root}: holds the label {count - 1} but names only {len(names)} classes; write the "
            "files again"
        )
    return tuple(
        BetonReader(samples, names, loader, notes=_left_out_when_written(samples))
        for samples in parts
    )


def _left_out_when_written(samples: Samples) -> tuple[str, ...]:
    """Return a line on the files that are missing from a .beton file, by its manifest."""
    damaged = len(samples.manifest.get("skipped", ()))
    others = samples.manifest.get("left_aside", {}).get("count", 0)
    if not damaged + others:
        return ()
    return (
        f"{samples.path}: written without {damaged} damaged images and {others} other files; its "
        "manifest lists them",
    )


def refuse_other_order(bare: Path, named: tuple[str, ...], other: str) -> None:
    """Raise DataError if a file without manifest may number its classes unlike `named`, other's.

    Names of folders are sorted as text (0, 1, 10, 2), by torchvision as by us; a file that FFCV's
    own writer made of numbers as labels counts 0, 1, 2. Nothing tells which one it is.
    """
    if not all(name.isdecimal() for name in named) or sorted(named, key=int) == list(named):
        return
    place = next(n for n, name in enumerate(sorted(named, key=int)) if name != named[n])
    raise DataError(
        f"{bare}: has no manifest to name its classes, which {other} sorts as text "
        f"({', '.join(named[: place + 1])}, …): its label {place} may mean another class than "
        f"{named[place]}; write it again with scripts/write_ffcv.py"
    )


def _same_classes(root: Path, train: tuple[str, ...], evaluation: tuple[str, ...]) -> None:
    if train == evaluation:
        return
    odd = sorted(set(train) ^ set(evaluation))
    for name in sorted(set(train) - set(evaluation)):
        if twin := look_alike(name, set(evaluation) - set(train)):
            raise DataError(
                f"{root}: a class looks the same in train and val, but its name is "
                f"{code_points(name)} in train and {code_points(twin)} in val; rename one of them"
            )
    where = "train" if odd and odd[0] in train else "val"
    raise DataError(
        f"{root}: train and val hold different classes "
        f"({f'{odd[0]}, only in {where}' if odd else 'in another order'})"
    )


DATASETS = {
    "fashion_mnist": DataSet(
        _open_fashion_mnist, fashion_mnist.MEAN, fashion_mnist.STD, needs_root=False
    ),
    "folder": DataSet(_open_folder),
    "beton": DataSet(_open_beton),
}
