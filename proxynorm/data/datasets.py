"""The registry of data sets: how each is opened, and how its images are normalized.

A new data set is an opener and an entry in DATASETS here, and a file configs/data/NAME.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from proxynorm.data import fashion_mnist
from proxynorm.data.cache import cached_beton
from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.folder import FolderReader
from proxynorm.data.images import StorageOptions
from proxynorm.data.readers import BetonReader, Reader
from proxynorm.data.sources import Listing, list_source, spelled
from proxynorm.data.spec import DataSpec, LoaderSpec
from proxynorm.errors import DataError

ODD_NAMED = 4  # classes that only one part has, in a message
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Called with the spec and the loader, whose name ("ffcv" or "torchvision") and workers are decided;
# returns the readers of the training and of the evaluation images.
Opener = Callable[[DataSpec, LoaderSpec], tuple[Reader, Reader]]


class DataSet(NamedTuple):
    """An entry of the registry.

    mean, std: per channel on the 0..1 scale, unless the user gives others. needs_root: the user
    must say where the images are.
    """

    open: Opener
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    needs_root: bool = True


def _open_files(spec: DataSpec, loader: LoaderSpec) -> tuple[Reader, Reader]:
    """Open root/train and root/val, folders of class folders or .beton files."""
    root = Path(spec.root).expanduser()
    ending = ".beton" if spec.name == "beton" else ""
    train, evaluation = (find_images(root / f"{part}{ending}") for part in ("train", "val"))
    classes = _common_classes(root, train, evaluation)
    return (
        images_reader(spec, train, classes, loader),
        images_reader(spec, evaluation, classes, loader),
    )


def find_images(path: Path) -> Listing | Samples:
    """Read the table of a .beton file, or list a folder of class folders. Raises DataError."""
    return read_beton(path) if path.suffix == ".beton" else list_source(path)


def images_reader(
    spec: DataSpec, found: Listing | Samples, classes: tuple[str, ...], loader: LoaderSpec
) -> Reader:
    """Return the reader of what find_images found, by the backend `loader` names.

    FFCV's converts a folder to a .beton file, kept in the cache while the images stay as they are.
    """
    if isinstance(found, Samples):
        return BetonReader(found, classes, loader)
    if loader.name == "torchvision":
        return FolderReader(found, loader)
    options = StorageOptions()
    signature = "\n".join([repr(options), *(_file_signature(i.path) for i in found.images)])
    samples = cached_beton(
        spec.cache,
        f"folder-{found.source.name}",
        signature,
        lambda path: prepare(found, path, options, spec.on_bad, loader.workers),
    )
    reader = BetonReader(samples, classes, loader)
    reader.source, reader.skipped = str(found.source), samples.manifest["skipped"]
    reader.notes = (*found.notes, *samples.empty_classes(found.source))
    return reader


def _file_signature(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError as error:  # such as a dangling link: preparation reports it
        return f"{path}:{error.errno}"
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def _common_classes(
    root: Path, train: Listing | Samples, evaluation: Listing | Samples
) -> tuple[str, ...]:
    """Return the names of the classes of both parts; a file of FFCV's own writer has none.

    Raises DataError if they are not the same.
    """
    names = train.classes or evaluation.classes
    if train.classes and evaluation.classes:
        if train.classes != evaluation.classes:
            odd = set(train.classes) ^ set(evaluation.classes)
            told = [
                f"{spelled(name)} only in {'train' if name in train.classes else 'val'}"
                for name in sorted(odd, key=lambda name: normalize("NFC", name))
            ]
            raise DataError(
                f"{root}: train and val hold different classes: {', '.join(told[:ODD_NAMED])}"
            )
    elif names:
        bare = evaluation if train.classes else train
        refuse_other_order(str(bare.path), names, "the other file")
    return names or numbered(1 + int(max(train.targets.max(), evaluation.targets.max())))


def numbered(count: int) -> tuple[str, ...]:
    """Return the names of classes that have none: a file of FFCV's own writer names no classes."""
    return tuple(map(str, range(count)))


def refuse_other_order(bare: str, named: Sequence[str], other: str) -> None:
    """Raise DataError if data without class names may number the classes unlike `named`, other's.

    Names of folders are sorted as text (0, 1, 10, 2), by torchvision as by us; a file that FFCV's
    own writer made of numbers as labels counts 0, 1, 2. Nothing tells which one it is.
    """
    if not all(name.isdecimal() for name in named):
        return
    by_text, by_number = sorted(named), sorted(named, key=int)
    if by_text != by_number:
        label = next(n for n, name in enumerate(by_text) if name != by_number[n])
        raise DataError(
            f"{bare}: has no manifest to name its classes, which {other} sorts as text "
            f"({', '.join(by_text[: label + 1])}, …): its label {label} may mean another class "
            f"than {by_text[label]}; write it again with scripts/write_ffcv.py"
        )


DATASETS = {
    "fashion_mnist": DataSet(
        fashion_mnist.open_fashion_mnist, fashion_mnist.MEAN, fashion_mnist.STD, needs_root=False
    ),
    "folder": DataSet(_open_files),
    "beton": DataSet(_open_files),
}
