"""Evaluation images alone, for a network that is trained; images without classes.

Class folders in a folder or in its val/, or a .beton file, or val.beton in a folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proxynorm.cli import nearest
from proxynorm.data.datasets import folder_reader, refuse_other_order
from proxynorm.data.ffcv.beton import read_beton
from proxynorm.data.images import EXTENSIONS, ImageRef
from proxynorm.data.loaders import Data, Split
from proxynorm.data.opening import choose_backend, share_of_cores
from proxynorm.data.readers import BetonReader, Failures, Reader
from proxynorm.data.sources import Listing, list_folder
from proxynorm.data.spec import DataInfo, DataSpec, LoaderSpec, check_specs, one_of
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
    root = Path(spec.root).expanduser()
    loader = replace(loader, workers=share_of_cores() if loader.workers is None else loader.workers)
    failures = Failures(spec.on_bad)
    reader = open_reader(spec, root, loader, failures)
    if classes != "index" and isinstance(reader, BetonReader) and not reader.samples.manifest:
        refuse_other_order(reader.samples.path, tuple(trained), "the trained network")
    numbers = class_numbers(root, reader.classes, list(trained), classes)
    columns = np.arange(len(trained))
    if classes == "subset":
        columns = np.sort(numbers)
        numbers = np.searchsorted(columns, numbers)
    reader.targets = numbers[reader.targets]
    return Validation(
        evaluation_data(spec, reader, [trained[i] for i in columns], failures), columns
    )


def open_reader(spec: DataSpec, root: Path, loader: LoaderSpec, failures: Failures) -> Reader:
    """Open the reader of a folder of class folders or of a .beton file."""
    if (root / "val.beton").is_file():
        root = root / "val.beton"
    if root.suffix == ".beton":
        check_specs(spec, loader)
        choose_backend(replace(spec, name="beton"), loader)
        samples = read_beton(root)
        numbered = map(str, range(1 + int(samples.target.max())))
        names = tuple(samples.manifest.get("classes", ())) or tuple(numbered)
        return BetonReader(samples, names, loader)
    spec = replace(spec, name="folder", randaugment=None)
    check_specs(spec, loader)
    folder = root / "val" if (root / "val").is_dir() else root
    backend = choose_backend(spec, loader)
    return folder_reader(spec, folder, list_folder(folder), backend, loader, failures)


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
        numbered = all(name.isdecimal() for name in present)
        advice = "classes=index takes folders as numbers of classes" if numbered else ""
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


def open_images(spec: DataSpec, loader: LoaderSpec, images: Path) -> tuple[Data, list[str], int]:
    """Open the images in and below a folder, or one file, without classes.

    Returns the data, the files' names by row, and the number of other files. Raises DataError.
    """
    paths, others = find_images(images)
    if not paths:
        raise DataError(f"{images}: holds no images ({', '.join(EXTENSIONS)})")
    listing = Listing(
        ("",), [ImageRef(path, path) for path in paths], np.zeros(len(paths), dtype=np.int64)
    )
    workers = share_of_cores() if loader.workers is None else loader.workers
    spec = replace(spec, name="folder", on_bad="skip", randaugment=None)
    failures = Failures(spec.on_bad)
    loader = replace(loader, workers=workers)
    reader = folder_reader(spec, images, listing, "torchvision", loader, failures)
    names = [reader.name(row) for row in range(len(paths))]
    return evaluation_data(spec, reader, [""], failures), names, others


def find_images(images: Path) -> tuple[list[str], int]:
    """Return the images in and below a folder, sorted, and how many other files there are."""
    if images.is_file():
        return [str(images)], 0
    if not images.is_dir():
        raise DataError(f"{images}: no such folder or file")
    found, others = [], 0
    for place, folders, names in os.walk(images):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        chosen = [name for name in names if name.lower().endswith(EXTENSIONS)]
        found += [os.path.join(place, name) for name in chosen]
        others += len(names) - len(chosen)
    return found, others


def evaluation_data(
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
    backend = "ffcv" if isinstance(reader, BetonReader) else "torchvision"
    return Data(spec, info, backend, split, split, failures, reader.notes)
