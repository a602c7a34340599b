"""The records of the data path: requests (DataSpec, LoaderSpec), and results (DataInfo, Batch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from proxynorm.cli import check_fields, choice, number
from proxynorm.errors import ConfigError

SIDE, SHARE = "from 1 to 65535", "from 0.001 to 1"


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
    start_size:    progressive resizing: training side up to epoch ramp[0]; it then grows to
                   image_size at epoch ramp[1]
    ramp:          first and last epoch of that growth
    limit:         train on the first N images of a shuffle seeded with limit_seed
    holdout:       evaluate on N training images, the end of that shuffle, and do not train on them
    deterministic: crops and flips depend on (seed, epoch, index) alone; False: also on the run
    on_bad:        a damaged image stops the run ("raise") or is left out and counted ("skip"). The
                   backends find it when they read it, FFCV's also when it converts the folder
    cache:         folder of converted files; None: $PROXYNORM_CACHE or ~/.cache/proxynorm
    randaugment:   timm's configuration string, such as "rand-m9-mstd0.5" (torchvision backend)
    random_erasing: probability that a box of 2 % to a third of the image gets the mean colour
    mean, std:     per channel, on the 0..1 scale; None: those of the data set, or ImageNet's
    """

    name: str
    root: str | None = None
    image_size: int = number(32, SIDE)
    eval_size: int | None = number(None, SIDE)
    eval_ratio: float = number(1.0, SHARE)
    augmentation: str = choice("pad_crop", "inception", "none")
    padding: int = number(4, "at least 0 and finite")
    min_area: float = number(0.08, SHARE)
    flip: bool = True
    start_size: int | None = number(None, SIDE)
    ramp: tuple[int, int] | None = None
    limit: int | None = number(None, "at least 1")
    limit_seed: int = 0
    holdout: int = number(0, "at least 0 and finite")
    deterministic: bool = True
    on_bad: str = choice("raise", "skip")
    cache: str | None = None
    randaugment: str | None = None
    random_erasing: float = number(0.0, "from 0 to 1")
    mean: tuple[float, ...] | None = number(None, "from 0 to 1")
    std: tuple[float, ...] | None = number(None, "above 0 and at most 1")


@dataclass(frozen=True)
class LoaderSpec:
    """The backend that reads the images, and its options.

    name:     "auto", "ffcv" or "torchvision"
    workers:  threads (ffcv) or processes (torchvision); None: the process's share of the cores;
              0: one thread (ffcv), or no other process (torchvision)
    prefetch: batches decoded in advance; 0: each is decoded on request, by all threads at once;
              None: at least three for ffcv, two per process for torchvision, whose minimum is one
              per process
    timeout:  seconds to wait for a batch before the run ends
    """

    name: str = choice("auto", "ffcv", "torchvision")
    workers: int | None = number(None, "at least 0 and finite")
    prefetch: int | None = number(None, "at least 0 and finite")
    timeout: float = number(600, "at least 1")


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
    check_fields(spec, "data.")
    check_fields(loader, "loader.")
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
