"""open_data: from a DataSpec to an opened data set."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from proxynorm.data.datasets import DATASETS
from proxynorm.data.ffcv.native import ffcv_available, ffcv_library
from proxynorm.data.folder import rand_augment
from proxynorm.data.loaders import Data, Failures, Split
from proxynorm.data.randomness import permutation
from proxynorm.data.readers import BetonReader, Reader
from proxynorm.data.spec import DataInfo, DataSpec, LoaderSpec, check_specs, one_of
from proxynorm.errors import ConfigError


def open_data(spec: DataSpec, loader: LoaderSpec | None = None) -> Data:
    """Open a data set with the backend that `loader` names.

    Raises ConfigError for an impossible value and DataError for missing or damaged data.
    """
    one_of("data.name", spec.name, DATASETS)
    data_set = DATASETS[spec.name]
    if data_set.needs_root and spec.root is None:
        raise ConfigError(f"data.name={spec.name} needs data.root=FOLDER")
    failures = Failures(spec.on_bad)
    train, evaluation = data_set.open(spec, decided(spec, loader or LoaderSpec()), failures)
    mean, std = tuple(spec.mean or data_set.mean), tuple(spec.std or data_set.std)
    if not len(mean) == len(std) == train.channels or min(std) <= 0:
        raise ConfigError(
            f"data.mean={list(mean)} data.std={list(std)}: give {train.channels} value(s) each, "
            "std above 0"
        )
    splits = _splits(spec, train, evaluation)
    counts = (len(split.rows) for split in splits)
    info = DataInfo(spec.name, train.classes, train.channels, *counts, mean, std)
    notes, available = warnings(train, evaluation), len(train.targets) - spec.holdout
    if spec.limit is not None and spec.limit > available:
        told = f"exceeds the {available} training images, which are all taken"
        notes = (f"data.limit={spec.limit} {told}", *notes)
    return Data(spec, info, *splits, failures, notes)


def decided(spec: DataSpec, loader: LoaderSpec) -> LoaderSpec:
    """Check both, and return the loader with its backend and its number of workers decided.

    Raises ConfigError.
    """
    check_specs(spec, loader)
    if spec.randaugment is not None:
        rand_augment(spec.randaugment, (0, 0, 0))  # a mistake in it shows here, not in a worker
    workers = share_of_cores() if loader.workers is None else loader.workers
    return replace(loader, name=_choose_backend(spec, loader.name), workers=workers)


def _choose_backend(spec: DataSpec, asked: str) -> str:
    if spec.name == "beton" and asked == "torchvision":
        raise ConfigError(
            "loader.name=torchvision cannot read data.name=beton; use loader.name=ffcv or "
            "data.name=folder"
        )
    if spec.name != "beton" and asked != "ffcv":
        fits = asked == "auto" and spec.randaugment is None and ffcv_available()
        return "ffcv" if fits else "torchvision"
    ffcv_library()
    if spec.randaugment is not None:
        raise ConfigError(
            "regularization.randaugment works on image folders alone: give data=folder "
            "loader=torchvision"
        )
    return "ffcv"


def warnings(*readers: Reader) -> tuple[str, ...]:
    """Return what the user should be told of the readers' images, one line each."""
    betons = [reader.samples for reader in readers if isinstance(reader, BetonReader)]
    bare = ", ".join(str(samples.path) for samples in betons if not samples.manifest)
    told = f"{bare}: no manifest, so classes, labels and later damage cannot be checked"
    notes = tuple(note for reader in readers for note in reader.notes)
    return (told, *notes) if bare else notes


def share_of_cores() -> int:
    """Return this process's share of the node's cores, among the processes of the run on it."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if "RANK" not in os.environ and "SLURM_CPUS_ON_NODE" in os.environ:  # srun, not torchrun
        allocated = int(os.environ["SLURM_CPUS_ON_NODE"])
        if processes > 1 and cores < allocated:
            return cores  # SLURM has bound the task to its share (task/affinity)
        cores = min(cores, allocated)  # not bound: every task sees the cores of all
    return max(1, cores // processes)


def _splits(spec: DataSpec, train: Reader, evaluation: Reader) -> tuple[Split, Split]:
    """Return the rows to train and to evaluate on.

    limit takes the front of a seeded shuffle, holdout its end.
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
