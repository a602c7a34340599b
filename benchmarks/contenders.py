"""The loaders that the loader benchmark compares, all with the same operations on the same JPEGs: random resized crop,
flip, uint8 images (N, 3, S, S) on the host. Normalization is left to the device, for all of them.

Each runs in a process of its own: `python -m benchmarks.contenders NAME ARGUMENTS` prints the seconds to its
first batch, then runs an epoch for every line it reads and prints how many images it gave in how many seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count

import torch

CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Work:
    """folder: train.beton, train/CLASS/*.jpg; the side of the crop in pixels, images a batch, threads or processes."""

    folder: str
    size: int
    batch: int
    workers: int


Epoch = Callable[[], Iterable]


def ours(work: Work, name: str, backend: str, deterministic: bool) -> Epoch:
    """An epoch of this package's loader, by a backend."""
    from proxynorm.data import DataSpec, LoaderSpec, open_data

    spec = DataSpec(
        name,
        root=work.folder,
        image_size=work.size,
        augmentation="inception",
        deterministic=deterministic,
    )
    loader = open_data(spec, LoaderSpec(backend, work.workers)).train_loader(
        work.batch, work.batch, seed=0
    )
    epochs = count()
    return lambda: (batch.images for batch in loader.epoch(next(epochs)))


def bare_ffcv(work: Work) -> Epoch:
    """FFCV's own Loader, as its documentation has it."""
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
    """torchvision's ImageFolder and transforms in torch's DataLoader, its workers kept from epoch to epoch."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    crop = transforms.RandomResizedCrop(work.size, CROP_AREA, CROP_RATIO)
    operations = transforms.Compose(
        [crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    loader = torch.utils.data.DataLoader(
        ImageFolder(f"{work.folder}/train", operations),
        batch_size=work.batch,
        shuffle=True,
        drop_last=True,
        num_workers=work.workers,
        persistent_workers=work.workers > 0,
    )
    return lambda: (images for images, _ in loader)


def timm_loader(work: Work) -> Epoch:
    """timm's create_loader with its prefetcher; the prefetcher's normalization, a device's work, is left out."""
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
    "proxynorm ffcv": lambda work: ours(work, "beton", "ffcv", True),
    "proxynorm ffcv, not deterministic": lambda work: ours(work, "beton", "ffcv", False),
    "ffcv.Loader": bare_ffcv,
    "proxynorm torchvision": lambda work: ours(work, "folder", "torchvision", True),
    "torchvision DataLoader": torchvision_loader,
    "timm create_loader": timm_loader,
}


def timed(batches: Iterator, start: float) -> dict[str, float]:
    """Run the batches to their end: {"images", "seconds" since start, "first_batch" seconds since start}."""
    images, first = 0, None
    for batch in batches:
        first = first or time.perf_counter() - start
        images += len(batch)
    return {"images": images, "seconds": time.perf_counter() - start, "first_batch": first}


def serve(name: str, work: Work) -> None:
    """Answer every line on standard input with the figures of one epoch, as JSON; the first line opens the loader."""
    torch.set_num_threads(1)
    epoch = None
    for _ in sys.stdin:
        start = time.perf_counter()
        epoch = epoch or CONTENDERS[name](work)
        print(json.dumps(timed(iter(epoch()), start)), flush=True)


def command(name: str, work: Work) -> list[str]:
    """The command line of a contender's process."""
    return [sys.executable, "-m", __spec__.name, name, json.dumps(asdict(work))]


if __name__ == "__main__":
    serve(sys.argv[1], Work(**json.loads(sys.argv[2])))
    # FFCV's threads outlive its loader.
    sys.stdout.flush()
    os._exit(0)
