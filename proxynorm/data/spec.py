"""The records of the data path: requests (DataSpec, LoaderSpec), and results (DataInfo, Batch)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from proxynorm.errors import ConfigError

AUGMENTATIONS = ("pad_crop", "inception", "none")
BACKENDS = ("auto", "ffcv", "torchvision")
BAD_POLICIES = ("raise", "skip")
# The smallest and the largest value of each number.
SIDE, SHARE, COUNT = (1, 65_535), (0.001, 1), (0, math.inf)
RANGES = {
    "data": {
        **dict.fromkeys(("image_size", "eval_size", "start_size"), SIDE),
        **dict.fromkeys(("eval_ratio", "min_area"), SHARE),
        **dict.fromkeys(("padding", "holdout"), COUNT),
        "limit": (1, math.inf),
        "random_erasing": (0, 1),
    },
    "loader": {"workers": COUNT, "prefetch": COUNT, "timeout": (1, math.inf)},
}


@dataclass(frozen=True)
class DataSpec:
    """A request for images: data set, size, augmentation. Sides in pixels, fractions in 0..1.

    name:          "fashion_mnist", "folder" (root/train/CLASS/*, root/val/CLASS/*) or "beton"
                   (root/train.beton, root/val.beton)
    root:          folder of the data; None: Fashion-MNIST's installed or downloaded files
    image_size:    side of the training crop
    eval_size:     side of the evaluation crop; None: image_size
    eval_ratio:    side of the centre crop, as a share of the image's shorter side
    augmentation:  "pad_crop" (pad with zeros, crop, flip), "inception" (random resized crop, flip),
                   "none" (centre)
    padding:       width of the zero border of pad_crop
    min_area:      smallest share of the image's area that an inception crop takes
    flip:          mirror half of the images, chosen at random
    start_size:    progressive resizing: training side up to epoch ramp[0]; it grows to image_size
                   at epoch ramp[1]
    ramp:          first and last epoch of that growth
    limit:         train on the first N images of a shuffle seeded with limit_seed
    holdout:       evaluate on N training images, the end of that shuffle, and do not train on them
    deterministic: crops and flips depend on (seed, epoch, index) alone; False: also on the run
    on_bad:        a damaged image stops the run ("raise") or is left out and counted ("skip"). The
                   backends find it when they draw it, FFCV's also when it converts the folder
    cache:         folder of converted files; None: $PROXYNORM_CACHE or ~/.cache/proxynorm
    randaugment:   timm's configuration string, such as "rand-m9-mstd0.5" (torchvision backend)
    random_erasing: probability that a box of 2 % to a third of the image gets the mean colour
    mean, std:     per channel, on the 0..1 scale; None: those of the data set, or ImageNet's
    """

    name: str
    root: str | None = None
    image_size: int = 32
    eval_size: int | None = None
    eval_ratio: float = 1.0
    augmentation: str = "pad_crop"
    padding: int = 4
    min_area: float = 0.08
    flip: bool = True
    start_size: int | None = None
    ramp: tuple[int, int] | None = None
    limit: int | None = None
    limit_seed: int = 0
    holdout: int = 0
    deterministic: bool = True
    on_bad: str = "raise"
    cache: str | None = None
    randaugment: str | None = None
    random_erasing: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LoaderSpec:
    """The backend that reads the images, and its options.

    name:     "auto", "ffcv" or "torchvision"
    workers:  threads (ffcv) or processes (torchvision); None: the process's share of the cores;
              0: one thread (ffcv), or no other process (torchvision)
    prefetch: batches decoded in advance; 0: each is decoded on request, by all threads at once;
              None: three for ffcv, two per process for torchvision, whose minimum is one per
              process
    timeout:  seconds to wait for a batch before the run ends
    """

    name: str = "auto"
    workers: int | None = None
    prefetch: int | None = None
    timeout: float = 600


@dataclass(frozen=True)
class DataInfo:
    """An opened data set: mean, std per channel on the 0..1 scale; counts over all processes."""

    name: str
    classes: tuple[str, ...]
    channels: int
    train_count: int
    eval_count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Batch(NamedTuple):
    """Images and their targets.

    images: uint8 (N, C, H, W) on the host, or the result of Data.prepare; targets, indices: int64
    (N,); valid: bool (N,), False for damaged images and for the padding of the last evaluation
    batch (index -1, target 0).
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    valid: torch.Tensor


def check_specs(spec: DataSpec, loader: LoaderSpec) -> None:
    """Raise ConfigError for the first impossible value."""
    one_of("data.augmentation", spec.augmentation, AUGMENTATIONS)
    one_of("data.on_bad", spec.on_bad, BAD_POLICIES)
    one_of("loader.name", loader.name, BACKENDS)
    check_ranges(spec, RANGES["data"], "data.")
    check_ranges(loader, RANGES["loader"], "loader.")
    start, ramp = spec.start_size, spec.ramp
    if start is None and ramp is None:
        return
    given = start is not None and ramp is not None
    if not (given and len(ramp) == 2 and 0 <= ramp[0] < ramp[1] and start <= spec.image_size):
        raise ConfigError(
            f"data.start_size={start} data.ramp={ramp}: progressive resizing needs a start_size of "
            f"at most image_size={spec.image_size} and a ramp from one epoch to a later one, "
            "such as [0,5]"
        )


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ConfigError if the value of `key` is none of the allowed ones."""
    if value not in allowed:
        raise ConfigError(f"{key}={value}: choose one of {', '.join(allowed)}")


def check_ranges(
    options: object, ranges: Mapping[str, tuple[float, float]], prefix: str = ""
) -> None:
    """Raise ConfigError for the first attribute of `options` that is out of its range."""
    for name, (least, most) in ranges.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            words = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise ConfigError(f"{prefix}{name}={value}: give {words}")
