"""open_data: from a DataSpec to an opened data set."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from proxynorm.data.datasets import DATASETS
from proxynorm.data.ffcv.native import ffcv_available, ffcv_library
from proxynorm.data.folder import rand_augment
from proxynorm.data.loaders import Data, Split
from proxynorm.data.randomness import permutation
from proxynorm.data.readers import BetonReader, Failures, Reader
from proxynorm.data.spec import DataInfo, DataSpec, LoaderSpec, check_specs, one_of
from proxynorm.errors import ConfigError


def open_data(spec: DataSpec, loader: LoaderSpec | None = None) -> Data:
    """Open a data set with the backend that `loader` names.

    Raises ConfigError for an impossible value and DataError for missing or damaged data.
    """
    loader = loader or LoaderSpec()
    one_of("data.name", spec.name, DATASETS)
    if DATASETS[spec.name].needs_root and spec.root is None:
        raise ConfigError(f"data.name={spec.name} needs data.root=FOLDER")
    check_specs(spec, loader)
    backend = choose_backend(spec, loader)
    if loader.workers is None:
        loader = replace(loader, workers=share_of_cores())
    if spec.randaugment is not None:
        rand_augment(spec.randaugment, (0, 0, 0))  # a mistake in it shows here, not in a worker
    failures = Failures(spec.on_bad)
    train, evaluation = DATASETS[spec.name].open(spec, backend, loader, failures)
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
    """Return what may not be what the user meant, one line each."""
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
    return (*lines, *train.notes, *evaluation.notes)


def choose_backend(spec: DataSpec, loader: LoaderSpec) -> str:
    """Return the backend, "ffcv" or "torchvision". ConfigError if the one asked for cannot."""
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
    held_out = Split(train, np.sort(shuffled[rest:]))
    return Split(train, rows), held_out if spec.holdout else Split(
        evaluation, np.arange(len(evaluation.targets))
    )


def _normalization(spec: DataSpec, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    usual = DATASETS[spec.name]
    mean, std = tuple(spec.mean or usual.mean), tuple(spec.std or usual.std)
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ConfigError(
            f"data.mean={list(mean)} data.std={list(std)}: give {channels} value(s) each, std "
            f"above 0"
        )
    return mean, std
