"""The registry of data sets: how each is opened, and how its images are normalized.

A new data set is an opener and an entry in DATASETS here, and a file configs/data/NAME.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from proxynorm.data import fashion_mnist
from proxynorm.data.cache import cache_folder, cached_beton
from proxynorm.data.ffcv.beton import Samples, read_beton
from proxynorm.data.ffcv.preparation import prepare, without_images
from proxynorm.data.folder import FolderReader
from proxynorm.data.images import StorageOptions
from proxynorm.data.loaders import Failures
from proxynorm.data.names import code_points, look_alike
from proxynorm.data.readers import BetonReader, Reader
from proxynorm.data.sources import Listing, list_folder
from proxynorm.data.spec import DataSpec, LoaderSpec
from proxynorm.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Called with the spec, the loader, whose name ("ffcv" or "torchvision") and workers are decided,
# and the failures; returns the readers of the training and of the evaluation images.
Opener = Callable[[DataSpec, LoaderSpec, Failures], tuple[Reader, Reader]]


class DataSet(NamedTuple):
    """An entry of the registry.

    mean, std: per channel on the 0..1 scale, unless the user gives others. needs_root: the user
    must say where the images are.
    """

    open: Opener
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    needs_root: bool = True


def _open_folder(spec: DataSpec, loader: LoaderSpec, failures: Failures) -> tuple[Reader, Reader]:
    root = Path(spec.root).expanduser()
    if not os.path.isdir(root):
        raise DataError(
            f"{root}: no such folder; give data.root with train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    train, evaluation = (list_folder(root / part) for part in ("train", "val"))
    _same_classes(root, train.classes, evaluation.classes)
    return (
        folder_reader(spec, root / "train", train, loader, failures),
        folder_reader(spec, root / "val", evaluation, loader, failures),
    )


def folder_reader(
    spec: DataSpec, folder: Path, listing: Listing, loader: LoaderSpec, failures: Failures
) -> Reader:
    """Return the reader of a folder's images by the backend `loader` names.

    FFCV's converts them to a .beton file, kept in the cache while the images stay as they are.
    """
    if loader.name == "torchvision":
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
    notes = (*listing.notes, *_empty_classes(folder, samples))
    return BetonReader(samples, listing.classes, loader, str(folder), notes)


def _file_signature(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError as error:  # such as a dangling link: preparation reports it
        return f"{path}:{error.errno}"
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def _open_beton(spec: DataSpec, loader: LoaderSpec, failures: Failures) -> tuple[Reader, Reader]:
    root = Path(spec.root).expanduser()
    train, evaluation = (read_beton(root / f"{part}.beton") for part in ("train", "val"))
    train_names, names = train.classes, evaluation.classes
    if train_names and names:
        _same_classes(root, train_names, names)
    elif names := train_names or names:
        bare = evaluation if train_names else train
        refuse_other_order(str(bare.path), names, "the other file")
    count = 1 + int(max(train.target.max(), evaluation.target.max()))
    names = names or numbered(count)
    if count > len(names):
        raise DataError(
            f"{root}: holds the label {count - 1} but names only {len(names)} classes; write the "
            "files again"
        )
    return beton_reader(train, names, loader), beton_reader(evaluation, names, loader)


def beton_reader(samples: Samples, classes: tuple[str, ...], loader: LoaderSpec) -> BetonReader:
    """Return the reader of a .beton file; its notes tell what was left out when it was written."""
    notes = _empty_classes(samples.path, samples)
    damaged = len(samples.manifest.get("skipped", ()))
    others = samples.manifest.get("left_aside", {}).get("count", 0)
    if damaged + others:
        told = (
            f"{samples.path}: written without {damaged} damaged images and {others} other files; "
            "its manifest lists them"
        )
        notes = (told, *notes)
    return BetonReader(samples, classes, loader, notes=notes)


def _empty_classes(source: Path, samples: Samples) -> tuple[str, ...]:
    counts = samples.manifest.get("count_per_class", {})
    return without_images(source, [name for name, count in counts.items() if not count])


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
    by_number = sorted(named, key=int)
    label = next((n for n, name in enumerate(sorted(named)) if name != by_number[n]), None)
    if label is None:
        return
    raise DataError(
        f"{bare}: has no manifest to name its classes, which {other} sorts as text "
        f"({', '.join(sorted(named)[: label + 1])}, …): its label {label} may mean another class "
        f"than {sorted(named)[label]}; write it again with scripts/write_ffcv.py"
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
        fashion_mnist.open_fashion_mnist, fashion_mnist.MEAN, fashion_mnist.STD, needs_root=False
    ),
    "folder": DataSet(_open_folder),
    "beton": DataSet(_open_beton),
}
