"""The loaders that the loader benchmark compares.

All do the same to the same JPEGs: random resized crop, flip, uint8 images (N, 3, S, S) on the
host. Normalization is the device's work and left out. Imports stand within the functions because
they belong to a loader's time to its first batch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import count

import torch

CLOCK_TICK = 1 / os.sysconf("SC_CLK_TCK")  # the resolution of processor time
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
Epoch = Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Work:
    """folder: as loader.lay_out makes it; size: side of the crop, pixels."""

    folder: str
    size: int
    batch: int
    workers: int


def ours(work: Work, name: str, backend: str, deterministic: bool = True) -> Epoch:
    """Return this package's loader, by a backend."""
    from proxynorm.data import DataSpec, LoaderSpec, open_data

    keys = {"augmentation": "inception", "deterministic": deterministic}
    spec = DataSpec(name, root=work.folder, image_size=work.size, **keys)
    data = open_data(spec, LoaderSpec(backend, work.workers))
    loader = data.train_loader(work.batch, work.batch, seed=0)
    epochs = count()
    return lambda: (batch.images for batch in loader.epoch(next(epochs)))


def ffcv_loader(work: Work) -> Epoch:
    """Return FFCV's own Loader, as its documentation has it."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    crop = RandomResizedCropRGBImageDecoder((work.size, work.size), CROP_AREA, CROP_RATIO)
    image = [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    loader = Loader(
        f"{work.folder}/train.beton",
        batch_size=work.batch,
        num_workers=work.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze(1)]},
    )
    return lambda: (images for images, _ in loader)


def torchvision_loader(work: Work) -> Epoch:
    """Return torchvision's ImageFolder and transforms in torch's DataLoader."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    crop = transforms.RandomResizedCrop(work.size, CROP_AREA, CROP_RATIO)
    operations = [crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    loader = torch.utils.data.DataLoader(
        ImageFolder(f"{work.folder}/train", transforms.Compose(operations)),
        batch_size=work.batch,
        shuffle=True,
        drop_last=True,
        num_workers=work.workers,
        persistent_workers=work.workers > 0,
    )
    return lambda: (images for images, _ in loader)


def timm_loader(work: Work) -> Epoch:
    """Return timm's create_loader with its prefetcher, less the prefetcher's normalization."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", f"{work.folder}/train"),
        (3, work.size, work.size),
        work.batch,
        is_training=True,
        scale=CROP_AREA,
        ratio=CROP_RATIO,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=work.workers,
        device=torch.device("cpu"),
        persistent_workers=work.workers > 0,
    )
    return lambda: (images for images, _ in loader.loader)


CONTENDERS: dict[str, Callable[[Work], Epoch]] = {
    "proxynorm ffcv": lambda work: ours(work, "beton", "ffcv"),
    "proxynorm ffcv, not deterministic": lambda work: ours(
        work, "beton", "ffcv", deterministic=False
    ),
    "ffcv.Loader": ffcv_loader,
    "proxynorm torchvision": lambda work: ours(work, "folder", "torchvision"),
    "torchvision DataLoader": torchvision_loader,
    "timm create_loader": timm_loader,
}


@cache
def open_loader(name: str, work: Work) -> Epoch:
    """Open a contender, once a process."""
    return CONTENDERS[name](work)


def run_epoch(name: str, work: Work) -> dict[str, float]:
    """Run an epoch in this process, whose first call opens the loader, within the time.

    Returns images, seconds, seconds until the first batch, CPU seconds with the loader's workers.
    """
    # The loaders have workers of their own; torch's threads would only compete with them.
    torch.set_num_threads(1)
    start, used = time.perf_counter(), cpu_seconds()
    images = first = 0
    for batch in open_loader(name, work)():
        first = first or time.perf_counter() - start
        images += len(batch)
    return {
        "images": images,
        "seconds": time.perf_counter() - start,
        "first_batch": first,
        "cpu_seconds": max(cpu_seconds() - used, CLOCK_TICK),
    }


def cpu_seconds(pid: int | None = None) -> float:
    """Processor time of a process and its descendants so far, awaited children included."""
    import psutil  # FFCV requires it

    process = psutil.Process(pid)
    tree = [process, *process.children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in tree)
