"""Small data sets, made on the spot, for the tests of the data path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from proxynorm.data import fashion_mnist
from proxynorm.data.ffcv.beton import manifest_path, sums_path
from proxynorm.data.ffcv.native import ffcv_available
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.sources import list_source
from tests.helpers import need

torch.set_num_threads(1)

needs_ffcv = need(ffcv_available(), "FFCV is not installed")
needs_fashion_mnist = need(
    fashion_mnist.DEBIAN_FOLDER.is_dir(), "dataset-fashion-mnist is not installed"
)
BACKENDS = [pytest.param("ffcv", marks=needs_ffcv), "torchvision"]
CLASSES = ("ant", "bee", "cow")


def photograph(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    """A smooth, colourful image, uint8 (height, width, 3), different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def write_folder(root: Path, train: int, val: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """root/train/CLASS/*.jpg and root/val/CLASS/*.jpg: `train` and `val` images per class, of
    different sizes."""
    for part, count in (("train", train), ("val", val)):
        for target, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for n in range(count):
                seed = 1000 * target + n + (500 if part == "val" else 0)
                image = photograph(seed, 80 + n % 5, 100 + 7 * (n % 3))
                Image.fromarray(image).save(folder / f"{n:03d}.jpg", quality=95)
    return root


def write_betons(root: Path, folder: Path | None = None, on_bad: str = "raise", **options) -> None:
    """Write train.beton and val.beton from root/train and root/val, into `folder` or root."""
    for part in ("train", "val"):
        output = (folder or root) / f"{part}.beton"
        prepare(list_source(root / part), output, StorageOptions(**options), on_bad)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    """One cache of .beton files for the whole session."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of 3 classes, 12 training and 4 evaluation photographs each. Do not change it."""
    return write_folder(tmp_path_factory.mktemp("photos"), 12, 4)


@pytest.fixture
def written(photos, tmp_path) -> Path:
    """train.beton of the training photographs, which a test may damage."""
    prepare(list_source(photos / "train"), tmp_path / "train.beton", StorageOptions())
    return tmp_path / "train.beton"


def change_byte(path: Path, position: int) -> None:
    """Flip a bit of a file."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def remove_companions(path: Path) -> None:
    """Delete manifest and checksums, which files of FFCV's own writer do not have."""
    manifest_path(path).unlink()
    sums_path(path).unlink()
