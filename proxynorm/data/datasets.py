"""The registry of data sets: how each is opened, and how its images are normalized.

To add a data set, write an opener, an entry in DATASETS below, and a file configs/data/NAME.yaml.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from proxynorm.data import fashion_mnist
from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.folder import FolderReader
from proxynorm.data.images import StorageOptions
from proxynorm.data.readers import BetonReader, Reader
from proxynorm.data.sources import Listing, list_source, spelled
from proxynorm.data.spec import DataSpec, LoaderSpec
from proxynorm.errors import DataError
from proxynorm.files import cache_folder, locked, writing

CLASSES_NAMED = 4  # in a message
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Returns the readers of the training and the evaluation images. Its LoaderSpec is resolved: name is
# "ffcv" or "torchvision", and workers is a number.
Opener = Callable[[DataSpec, LoaderSpec], tuple[Reader, Reader]]


class DataSet(NamedTuple):
    """An entry of the registry.

    mean, std: the defaults, per channel on the 0..1 scale. needs_root: data.root must be given.
    """

    open: Opener
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    needs_root: bool = True


def _open_files(spec: DataSpec, loader: LoaderSpec) -> tuple[Reader, Reader]:
    """Open root/train and root/val, folders of class folders or .beton files."""
    root = Path(spec.root).expanduser()
    suffix = ".beton" if spec.name == "beton" else ""
    paths = [root / f"{part}{suffix}" for part in ("train", "val")]
    for path in paths:
        if not path.exists() and not suffix:
            layout = "data=folder reads train/CLASS/* and val/CLASS/* in data.root"
            raise DataError(f"{path}: no such folder; {layout}")
    train, evaluation = map(find_images, paths)
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
    """Return a reader of what find_images found, for the backend that `loader` names.

    For FFCV, a folder is converted to a .beton file in the cache, and again if an image changes.
    """
    if isinstance(found, Samples):
        return BetonReader(found, classes, loader)
    if loader.name == "torchvision":
        return FolderReader(found, loader)
    samples = _converted(spec, found, loader.workers)
    reader = BetonReader(samples, classes, loader)
    reader.source, reader.skipped = str(found.source), samples.manifest["skipped"]
    reader.notes = (*found.notes, *samples.empty_class_notes(found.source))
    return reader


def _converted(spec: DataSpec, found: Listing, workers: int) -> Samples:
    """Return the folder's .beton file in the cache, written if it is missing or damaged.

    One process writes it; others wait and reuse it.
    """
    options = StorageOptions()
    signature = "\n".join([repr(options), *(_file_signature(i.path) for i in found.images)])
    # File names need not be UTF-8.
    digest = hashlib.sha256(signature.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = cache_folder(spec.cache) / f"folder-{found.source.name}-{digest}.beton"
    with writing(path), locked(path.with_suffix(".lock")):
        with suppress(DataError):  # missing or damaged
            samples = read_beton(path)
            if samples.manifest:
                return samples
        path.unlink(missing_ok=True)  # makes room for the new file
        return prepare(found, path, options, spec.on_bad, workers)


def _file_signature(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError as error:  # a dangling link, for example; the conversion reports it
        return f"{path}:{error.errno}"
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def _common_classes(
    root: Path, train: Listing | Samples, evaluation: Listing | Samples
) -> tuple[str, ...]:
    """Return the names of the classes, which must be the same in both parts.

    A file of FFCV's own writer names no classes. It takes those of the other part, or numbers.
    Raises DataError if the two parts disagree, or if they might.
    """
    if not train.classes and not evaluation.classes:
        return numbered(1 + int(max(train.targets.max(), evaluation.targets.max())))
    if not train.classes:
        check_numbering(str(train.path), evaluation.classes, "the other file")
        return evaluation.classes
    if not evaluation.classes:
        check_numbering(str(evaluation.path), train.classes, "the other file")
    elif train.classes != evaluation.classes:
        different = set(train.classes) ^ set(evaluation.classes)
        lines = [
            f"{spelled(name)} only in {'train' if name in train.classes else 'val'}"
            for name in sorted(different, key=lambda name: normalize("NFC", name))
        ]
        raise DataError(
            f"{root}: train and val hold different classes: {', '.join(lines[:CLASSES_NAMED])}"
        )
    return train.classes


def numbered(count: int) -> tuple[str, ...]:
    """Return the names of unnamed classes, as in a file of FFCV's own writer: their numbers."""
    return tuple(map(str, range(count)))


def check_numbering(unnamed: str, classes: Sequence[str], other: str) -> None:
    """Raise DataError if the labels of `unnamed`, data without class names, are ambiguous.

    classes: the names in `other`. Like torchvision, we sort names that are numbers as text (0, 1,
    10, 2). Labels in a file of FFCV's own writer may follow that order or count 0, 1, 2; the file
    does not say which.
    """
    if not all(name.isdecimal() for name in classes):
        return
    by_text, by_number = sorted(classes), sorted(classes, key=int)
    if by_text != by_number:
        label = next(n for n, name in enumerate(by_text) if name != by_number[n])
        raise DataError(
            f"{unnamed}: has no manifest with the names of its classes, which {other} sorts as "
            f"text ({', '.join(by_text[: label + 1])}, …): its label {label} may mean another "
            f"class than {by_text[label]}; write it again with scripts/write_ffcv.py"
        )


DATASETS = {
    "fashion_mnist": DataSet(
        fashion_mnist.open_fashion_mnist, fashion_mnist.MEAN, fashion_mnist.STD, needs_root=False
    ),
    "folder": DataSet(_open_files),
    "beton": DataSet(_open_files),
}
