"""Opens data sets: for training, for evaluation alone, and images without classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from proxynorm.cli import nearest
from proxynorm.data.datasets import DATASETS, check_numbering, find_images, images_reader, numbered
from proxynorm.data.ffcv.native import ffcv_available, ffcv_library
from proxynorm.data.folder import FolderReader, rand_augment
from proxynorm.data.loaders import Data, Split
from proxynorm.data.randomness import permutation
from proxynorm.data.readers import Reader
from proxynorm.data.sources import list_images
from proxynorm.data.spec import DataInfo, DataSpec, LoaderSpec, check_specs
from proxynorm.errors import ConfigError, DataError


def open_data(spec: DataSpec, loader: LoaderSpec | None = None) -> Data:
    """Open a data set with the backend that `loader` names.

    Raises ConfigError for an impossible value and DataError for missing or damaged data.
    """
    if spec.name not in DATASETS:
        raise ConfigError(f"data.name={spec.name}: {nearest(spec.name, DATASETS)}")
    data_set = DATASETS[spec.name]
    if data_set.needs_root and spec.root is None:
        raise ConfigError(f"data.name={spec.name} needs data.root=FOLDER")
    train, evaluation = data_set.open(spec, _resolve(spec, loader or LoaderSpec()))
    mean, std = tuple(spec.mean or data_set.mean), tuple(spec.std or data_set.std)
    if not len(mean) == len(std) == train.channels:
        raise ConfigError(
            f"data.mean={list(mean)} data.std={list(std)}: give {train.channels} value(s) each"
        )
    splits = _splits(spec, train, evaluation)
    counts = (len(split.rows) for split in splits)
    info = DataInfo(spec.name, train.classes, train.channels, *counts, mean, std)
    notes = (*train.notes, *evaluation.notes)
    available = len(train.targets) - spec.holdout
    if spec.limit is not None and spec.limit > available:
        excess = f"exceeds the {available} training images, which are all taken"
        notes = (f"data.limit={spec.limit} {excess}", *notes)
    if len(train.classes) == 1:
        notes = (f"{train.source}: has one class only, so there is nothing to learn", *notes)
    return Data(spec, info, *splits, notes)


def _splits(spec: DataSpec, train: Reader, evaluation: Reader) -> tuple[Split, Split]:
    """Choose the rows to train and to evaluate on.

    limit takes the start of a seeded shuffle, holdout its end.
    """
    count = len(train.targets)
    if spec.holdout >= count:
        raise ConfigError(
            f"data.holdout={spec.holdout} leaves none of the {count} training images to train on"
        )
    shuffled = permutation(spec.limit_seed, 0, count)
    rest = count - spec.holdout
    rows = np.sort(shuffled[: min(spec.limit or rest, rest)])
    if spec.holdout:
        return Split(train, rows), Split(train, np.sort(shuffled[rest:]))
    return Split(train, rows), Split(evaluation, np.arange(len(evaluation.targets)))


def open_validation(
    spec: DataSpec, loader: LoaderSpec, trained: Sequence[str], classes: str = "all"
) -> Data:
    """Open only the evaluation images at spec.root, for a network with the `trained` classes.

    spec.root: a folder of class folders, a .beton file, or a folder that has one of them as val/ or
    val.beton. classes: "all": the folders are the trained classes; "subset": they are some of them,
    and info.classes has only those (ImageNet-A, -R); "index": their names are class numbers
    (ImageNet-V2). spec.mean, spec.std: as in training. Raises ConfigError or DataError.
    """
    root = Path(spec.root).expanduser()
    root = next((root / part for part in ("val.beton", "val") if (root / part).exists()), root)
    name = "beton" if root.suffix == ".beton" else "folder"
    spec = replace(spec, name=name, randaugment=None)
    loader, found = _resolve(spec, loader), find_images(root)
    present = found.classes or numbered(1 + int(found.targets.max()))
    reader = images_reader(spec, found, present, loader)
    if classes != "index":
        # After training on a file without a manifest, the names are numbers.
        unnamed = tuple(trained) == numbered(len(trained))
        if found.classes and unnamed:
            check_numbering("the data that the network was trained on", trained, str(root))
        elif not found.classes and not unnamed:
            check_numbering(str(root), trained, "the trained network")
    numbers = _class_numbers(root, present, list(trained), classes)
    if classes == "subset":
        kept = np.sort(numbers)
        trained, numbers = [trained[n] for n in kept], np.searchsorted(kept, numbers)
    reader.targets = numbers[reader.targets]
    return _evaluation_data(spec, reader, trained)


def _class_numbers(
    root: Path, present: Sequence[str], trained: list[str], classes: str
) -> np.ndarray:
    """Return each present class's number in the list of trained classes, int64 (N,).

    classes: see open_validation. Raises DataError for unknown and for missing classes.
    """
    if classes == "index":
        numbers = {name: int(name) for name in present if name.isdecimal()}
        known = {name: number for name, number in numbers.items() if number < len(trained)}
    else:
        known = {name: number for number, name in enumerate(trained)}
    if unknown := [name for name in present if name not in known]:
        if classes == "index":
            advice = f"classes=index takes folders as numbers from 0 to {len(trained) - 1}"
        elif all(name.isdecimal() for name in present):
            advice = "classes=index takes folders as numbers of classes"
        else:
            advice = nearest(unknown[0], trained[:20])
        raise DataError(
            f"{root}: the network knows no class {unknown[0]} ({len(unknown)} such of "
            f"{len(present)}); {advice}"
        )
    absent = [name for name in trained if name not in present]
    if absent and classes == "all":
        raise DataError(
            f"{root}: {len(absent)} of the {len(trained)} classes are missing (the first: "
            f"{absent[0]}); classes=subset evaluates on the others alone"
        )
    return np.array([known[name] for name in present], dtype=np.int64)


def open_images(spec: DataSpec, loader: LoaderSpec, images: Path) -> tuple[Data, list[str]]:
    """Open the images in and below a folder, or one file, without classes.

    Returns the data and the files' names by row. Raises DataError.
    """
    spec = replace(spec, name="folder", on_bad="skip", randaugment=None)
    reader = FolderReader(list_images(images), _resolve(spec, replace(loader, name="torchvision")))
    names = [reader.name(row) for row in range(len(reader.targets))]
    return _evaluation_data(spec, reader, [""]), names


def _evaluation_data(spec: DataSpec, reader: Reader, classes: Sequence[str]) -> Data:
    """Return the Data of one reader's images.

    Raises DataError if the network was trained on images with another number of channels.
    """
    if len(spec.mean) != reader.channels:
        raise DataError(
            f"{reader.source}: images of {reader.channels} channels, but the network was "
            f"trained on images of {len(spec.mean)}"
        )
    count = len(reader.targets)
    split = Split(reader, np.arange(count))
    info = DataInfo(spec.name, tuple(classes), reader.channels, 0, count, spec.mean, spec.std)
    return Data(spec, info, split, split, reader.notes)


def _resolve(spec: DataSpec, loader: LoaderSpec) -> LoaderSpec:
    """Check both, and return the loader with its backend and number of workers resolved.

    Raises ConfigError.
    """
    check_specs(spec, loader)
    if spec.randaugment is not None:
        rand_augment(spec.randaugment, (0, 0, 0))  # reports a mistake here, not in a worker
    workers = share_of_cores() if loader.workers is None else loader.workers
    return replace(loader, name=_choose_backend(spec, loader.name), workers=workers)


def _choose_backend(spec: DataSpec, asked: str) -> str:
    """Return "ffcv" or "torchvision" for loader.name=`asked`. Raises ConfigError."""
    if spec.name == "beton" and asked == "torchvision":
        raise ConfigError(
            "loader.name=torchvision cannot read data.name=beton; use loader.name=ffcv or "
            "data.name=folder"
        )
    if spec.name != "beton" and asked != "ffcv":
        use_ffcv = asked == "auto" and spec.randaugment is None and ffcv_available()
        return "ffcv" if use_ffcv else "torchvision"
    ffcv_library()  # raises ConfigError if FFCV is missing
    if spec.randaugment is not None:
        raise ConfigError(
            "regularization.randaugment works on image folders alone: use data=folder "
            "loader=torchvision"
        )
    return "ffcv"


def share_of_cores() -> int:
    """Return this process's share of the node's cores, divided among the run's processes on it."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if "RANK" not in os.environ and "SLURM_CPUS_ON_NODE" in os.environ:  # srun, not torchrun
        allocated = int(os.environ["SLURM_CPUS_ON_NODE"])
        if processes > 1 and cores < allocated:
            return cores  # SLURM has bound the process to its share (task/affinity)
        cores = min(cores, allocated)  # not bound: every process sees all of them
    return max(1, cores // processes)
