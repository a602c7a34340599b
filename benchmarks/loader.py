"""Images per second of six loaders on the same JPEGs: ours, FFCV's, torchvision's, timm's.

  python scripts/benchmark.py loader source=DIR json=results/loader/NAME.json

source is a folder of class folders; without it, images are generated. All loaders have the same
number of workers and take turns, one epoch at a time. Those with FFCV read the .beton file that
write_ffcv.py makes from the source; the others read the same JPEGs as files. All do the same work:
random resized crop, flip, uint8 images (N, 3, S, S) on the host. Normalization is left out, because
the device does it.
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
COUNT = "number of images, drawn at random from source, or generated"
WORKERS = "threads or processes of each loader; all cores if left out"
Epoch = Callable[[], Iterable[torch.Tensor]]


@dataclass
class Options(common.Options):
    source: str | None = option(None, SOURCE)
    images: int = option(2048, COUNT, "at least 1")
    size: int = option(224, "side of the crop, pixels", "at least 1")
    batch: int = option(64, "images per batch", "at least 1")
    workers: int | None = option(None, WORKERS, "at least 1")
    rounds: int = option(7, "epochs of each loader, interleaved", "at least 1")


def main(options: Options) -> None:
    ffcv_library()
    check(options)
    workers = options.workers = options.workers or share_of_cores()
    listing = photographs(options.source, options.images)
    with tempfile.TemporaryDirectory(prefix="proxynorm-benchmark-") as name:
        folder = Path(name)
        size = lay_out(listing, folder, workers)
        print(f"{len(listing.images)} images of {size} bytes; {workers} workers", flush=True)
        epochs = {name: make(folder, options) for name, make in CONTENDERS.items()}
        speeds = measure(epochs, options.rounds)
    table = rows(speeds)
    common.show(table)
    content = {"workers": workers, "images": len(listing.images), "mean_bytes": size}
    common.write_results(options, {**content, "table": table, "images_per_second": speeds})


def check(options: Options) -> None:
    """Raise ConfigError for fewer images than a batch."""
    if options.images < options.batch:
        raise ConfigError(f"images={options.images}: give at least batch={options.batch}")


def write_beton(listing: Listing, folder: Path, storage: StorageOptions, workers: int) -> Samples:
    """Write folder/train.beton, and val.beton as links to it."""
    samples = prepare(listing, folder / "train.beton", storage, "raise", workers)
    for suffix in ("", ".json", ".sums.npy"):
        (folder / f"val.beton{suffix}").symlink_to(f"train.beton{suffix}")
    return samples


def lay_out(listing: Listing, folder: Path, workers: int) -> int:
    """Write folder/train.beton, and its JPEGs as folder/train/CLASS/*; val has the same images.

    Returns the mean size of an image, bytes.
    """
    samples = write_beton(listing, folder, StorageOptions(), workers)
    data = samples.path.read_bytes()
    for row, (start, size) in enumerate(zip(samples.pointer.tolist(), samples.size.tolist())):
        path = folder / "train" / listing.classes[listing.targets[row]] / f"{row:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[start : start + size])
    (folder / "val").symlink_to("train")
    return round(float(samples.size.mean()))


def rows(speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return the table, a row per loader."""
    return [
        {
            "loader": name,
            "images_per_second": round(median(found), 1),
            "ours_over_it": round(common.ratio(speeds[OURS], found), 3),
        }
        for name, found in speeds.items()
    ]


def ours(folder: Path, options: Options, backend: str, deterministic: bool = True) -> Epoch:
    """Return this package's loader with a backend."""
    spec = DataSpec(
        "beton" if backend == "ffcv" else "folder",
        root=str(folder),
        image_size=options.size,
        augmentation="inception",
        deterministic=deterministic,
    )
    data = open_data(spec, LoaderSpec(backend, options.workers))
    loader = data.train_loader(options.batch, options.batch, seed=0)
    epochs = count()
    return lambda: (batch.images for batch in loader.epoch(next(epochs)))


def ffcv_loader(folder: Path, options: Options) -> Epoch:
    """Return FFCV's own Loader, as in its documentation."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    crop = RandomResizedCropRGBImageDecoder((options.size, options.size), CROP_AREA, CROP_RATIO)
    image = [crop, RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(folder / "train.beton"),
        batch_size=options.batch,
        num_workers=options.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze(1)]},
    )
    return lambda: (images for images, _ in loader)


def torchvision_loader(folder: Path, options: Options) -> Epoch:
    """Return torchvision's ImageFolder and transforms in torch's DataLoader."""
    crop = transforms.RandomResizedCrop(options.size, CROP_AREA, CROP_RATIO)
    operations = [crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    loader = torch.utils.data.DataLoader(
        ImageFolder(folder / "train", transforms.Compose(operations)),
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    return lambda: (images for images, _ in loader)


def timm_loader(folder: Path, options: Options) -> Epoch:
    """Return timm's create_loader with its prefetcher, but without normalization."""
    loader = create_loader(
        create_dataset("", str(folder / "train")),
        (3, options.size, options.size),
        options.batch,
        is_training=True,
        scale=CROP_AREA,
        ratio=CROP_RATIO,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=options.workers,
        device=torch.device("cpu"),
        persistent_workers=options.workers > 0,
    )
    return lambda: (images for images, _ in loader.loader)


CONTENDERS: dict[str, Callable[[Path, Options], Epoch]] = {
    OURS: partial(ours, backend="ffcv"),
    "proxynorm ffcv, not deterministic": partial(ours, backend="ffcv", deterministic=False),
    "ffcv.Loader": ffcv_loader,
    "proxynorm torchvision": partial(ours, backend="torchvision"),
    "torchvision DataLoader": torchvision_loader,
    "timm create_loader": timm_loader,
}


def measure(epochs: Mapping[Name, Epoch], rounds: int) -> dict[Name, list[float]]:
    """Return the images per second of each loader in each round, after a warm-up round."""
    # torch's threads would only compete with the loaders' own workers.
    torch.set_num_threads(1)
    images: dict[Name, int] = {}

    def run(name: Name) -> None:
        images[name] = sum(map(len, epochs[name]()))

    times = common.take_turns({name: partial(run, name) for name in epochs}, rounds)
    return {name: [images[name] / seconds for seconds in found] for name, found in times.items()}
