"""Evaluation images alone, for a network that is trained; images without classes.

Class folders in a folder or in its val/, or a .beton file, or val.beton in a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proxynorm.cli import nearest
from proxynorm.data.datasets import beton_reader, folder_reader, numbered, refuse_other_order
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.folder import FolderReader
from proxynorm.data.loaders import Data, Failures, Split
from proxynorm.data.opening import decided, warnings
from proxynorm.data.readers import Reader
from proxynorm.data.sources import list_folder, list_images
from proxynorm.data.spec import DataInfo, DataSpec, LoaderSpec, one_of
from proxynorm.errors import DataError

CLASSES = ("all", "subset", "index")


class Validation(NamedTuple):
    """Opened images; columns: the logits, int64 (K,), that belong to data.info.classes."""

    data: Data
    columns: np.ndarray


def open_validation(
    spec: DataSpec, loader: LoaderSpec, trained: Sequence[str], classes: str = "all"
) -> Validation:
    """Open the images at spec.root alone, their classes matched with those the network knows.

    classes: "all": the folders are the trained classes; "subset": some of them, and only their
    logits count (ImageNet-A, -R); "index": they are the numbers of the classes (ImageNet-V2).
    spec.mean and spec.std: the training's. Raises ConfigError or DataError.
    """
    one_of("classes", classes, CLASSES)
    root, failures = Path(spec.root).expanduser(), Failures(spec.on_bad)
    if (root / "val.beton").is_file():
        root = root / "val.beton"
    is_beton = root.suffix == ".beton"
    spec = replace(spec, name="beton" if is_beton else "folder", randaugment=None)
    loader = decided(spec, loader)
    if is_beton:
        samples = read_beton(root)
        named, present = samples.classes, numbered(1 + int(samples.target.max()))
        reader: Reader = beton_reader(samples, named or present, loader)
    else:
        folder = root / "val" if (root / "val").is_dir() else root
        reader = folder_reader(spec, folder, list_folder(folder), loader, failures)
        named = reader.classes
    if classes != "index":
        _refuse_unknown_order(root, named, trained)
    numbers = class_numbers(root, reader.classes, list(trained), classes)
    columns = np.arange(len(trained))
    if classes == "subset":
        columns = np.sort(numbers)
        numbers = np.searchsorted(columns, numbers)
    reader.targets = numbers[reader.targets]
    data = _evaluation_data(spec, reader, [trained[i] for i in columns], failures)
    return Validation(data, columns)


def _refuse_unknown_order(root: Path, named: Sequence[str], trained: Sequence[str]) -> None:
    """Raise DataError if one side names its classes and the other may number them otherwise.

    A network that was trained on a file without manifest knows its classes by number alone.
    """
    by_number = tuple(trained) == numbered(len(trained))
    if named and by_number:
        refuse_other_order("the data that the network was trained on", trained, str(root))
    elif not named and not by_number:
        refuse_other_order(str(root), trained, "the trained network")


def class_numbers(
    root: Path, present: Sequence[str], trained: list[str], classes: str
) -> np.ndarray:
    """Return the trained class, int64 (N,), that each present class is. Raises DataError."""
    if classes == "index":
        wrong = [name for name in present if not name.isdecimal() or int(name) >= len(trained)]
        if wrong:
            raise DataError(
                f"{root}: class {wrong[0]} is no number from 0 to {len(trained) - 1}; "
                "classes=index is for folders that are numbers of classes"
            )
        return np.array([int(name) for name in present], dtype=np.int64)
    unknown = [name for name in present if name not in trained]
    absent = [name for name in trained if name not in present]
    if unknown:
        numbers = all(name.isdecimal() for name in present)
        advice = "classes=index takes folders as numbers of classes" if numbers else ""
        raise DataError(
            f"{root}: the network knows no class {unknown[0]} ({len(unknown)} such of "
            f"{len(present)}); {advice or nearest(unknown[0], trained[:20])}"
        )
    if absent and classes == "all":
        raise DataError(
            f"{root}: {len(absent)} of the {len(trained)} classes are missing (the first: "
            f"{absent[0]}); classes=subset evaluates over those that are there"
        )
    return np.array([trained.index(name) for name in present], dtype=np.int64)


def open_images(spec: DataSpec, loader: LoaderSpec, images: Path) -> tuple[Data, list[str]]:
    """Open the images in and below a folder, or one file, without classes.

    Returns the data and the files' names by row. Raises DataError.
    """
    spec = replace(spec, name="folder", on_bad="skip", randaugment=None)
    loader = decided(spec, replace(loader, name="torchvision"))
    reader = FolderReader(list_images(images), str(images), loader)
    names = [reader.name(row) for row in range(len(reader.targets))]
    return _evaluation_data(spec, reader, [""], Failures(spec.on_bad)), names


def _evaluation_data(
    spec: DataSpec, reader: Reader, classes: Sequence[str], failures: Failures
) -> Data:
    """Return the Data of one reader's images. Raises DataError for a network of grey images."""
    if len(spec.mean) != reader.channels:
        raise DataError(
            f"{reader.source}: images of {reader.channels} channels, but the network was "
            f"trained on images of {len(spec.mean)}"
        )
    count = len(reader.targets)
    split = Split(reader, np.arange(count))
    info = DataInfo(spec.name, tuple(classes), reader.channels, 0, count, spec.mean, spec.std)
    return Data(spec, info, split, split, failures, warnings(reader))
