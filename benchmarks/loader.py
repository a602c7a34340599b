"""Images a second of six loaders on the same JPEGs: ours, FFCV's, torchvision's, timm's.

  python scripts/benchmark.py loader source=DIR json=results/loader/NAME.json

source is a folder of class folders; without it, images are made. Each loader has as many workers;
they take turns, an epoch at a time. FFCV's loaders read the .beton file that write_ffcv.py makes of
the source, the others the same JPEGs as files. All do the same: random resized crop, flip, uint8
images (N, 3, S, S) on the host. Normalization is the device's work and left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks import common
from benchmarks.common import Name
from benchmarks.photographs import SOURCE, photographs
from proxynorm.cli import option
from proxynorm.data import DataSpec, LoaderSpec, open_data
from proxynorm.data.ffcv.beton import Samples
from proxynorm.data.ffcv.native import ffcv_library
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import Listing
from proxynorm.errors import ConfigError

OURS = "proxynorm ffcv"
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
Epoch = Callable[[], Iterable[torch.Tensor]]


@dataclass
class Options(common.Options):
    source: str | None = option(None, SOURCE)
    images: int = option(2048, "how many of its images, drawn at random, or made")
    size: int = option(224, "side of the crop, pixels")
    batch: int = option(64, "images a batch")
    workers: int | None = option(None, "threads or processes of each loader; all cores if left out")
    rounds: int = option(7, "epochs of each loader, taken in turns")


def main(options: Options) -> None:
    ffcv_library()
    check(options)
    workers = options.workers or share_of_cores()
    listing = photographs(options.source, options.images)
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        size = lay_out(listing, Path(name), workers)
        print(f"{len(listing.images)} images of {size} bytes; {workers} workers", flush=True)
        work = Work(name, options.size, options.batch, workers)
        speeds = measure({name: make(work) for name, make in CONTENDERS.items()}, options.rounds)
    table = rows(speeds)
    common.show(table)
    content = {"workers": workers, "images": len(listing.images), "mean_bytes": size}
    common.write_figures(options, {**content, "table": table, "images_per_second": speeds})


def check(options: Any) -> None:
    """Raise ConfigError for numbers below 1 or fewer images than a batch."""
    common.check(options)
    if options.images < options.batch:
        raise ConfigError(f"images={options.images}: give at least batch={options.batch}")


def store(listing: Listing, folder: Path, storage: StorageOptions, workers: int) -> Samples:
    """Write folder/train.beton; val.beton is the same file."""
    samples = prepare(listing, folder / "train.beton", storage, "raise", workers)
    for suffix in ("", ".json", ".sums.npy"):
        (folder / f"val.beton{suffix}").symlink_to(f"train.beton{suffix}")
    return samples


def lay_out(listing: Listing, folder: Path, workers: int) -> int:
    """Make folder/train.beton and, of its JPEGs, folder/train/CLASS/*, and val alike.

    Returns the mean bytes of an image.
    """
    samples = store(listing, folder, StorageOptions(), workers)
    data = samples.path.read_bytes()
    for row, (start, size) in enumerate(zip(samples.pointer.tolist(), samples.size.tolist())):
        path = folder / "train" / listing.classes[listing.targets[row]] / f"{row:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[start : start + size])
    (folder / "val").symlink_to("train")
    return round(float(samples.size.mean()))


def rows(speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The table: a row a loader."""
    return [
        {
            "loader": name,
            "images_per_second": round(median(found), 1),
            "ours_over_it": round(common.ratio(speeds[OURS], found), 3),
        }
        for name, found in speeds.items()
    ]


@dataclass(frozen=True)
class Work:
    """folder: as loader.lay_out makes it; size: side of the crop, pixels."""

    folder: str
    size: int
    batch: int
    workers: int


def ours(work: Work, name: str, backend: str, deterministic: bool = True) -> Epoch:
    """Return this package's loader, by a backend."""
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
    OURS: lambda work: ours(work, "beton", "ffcv"),
    "proxynorm ffcv, not deterministic": lambda work: ours(
        work, "beton", "ffcv", deterministic=False
    ),
    "ffcv.Loader": ffcv_loader,
    "proxynorm torchvision": lambda work: ours(work, "folder", "torchvision"),
    "torchvision DataLoader": torchvision_loader,
    "timm create_loader": timm_loader,
}


def measure(epochs: Mapping[Name, Epoch], rounds: int) -> dict[Name, list[float]]:
    """Images a second of each loader, a figure a round, after a round that is not counted."""
    # The loaders have workers of their own; torch's threads would only compete with them.
    torch.set_num_threads(1)
    images: dict[Name, int] = {}

    def run(name: Name) -> None:
        images[name] = sum(map(len, epochs[name]()))

    times = common.take_turns({name: partial(run, name) for name in epochs}, rounds)
    return {name: [images[name] / seconds for seconds in found] for name, found in times.items()}
