"""Fashion-MNIST (arXiv 1708.07747), found or downloaded, and held in memory."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from proxynorm.cli import first_line
from proxynorm.data.readers import MemoryReader
from proxynorm.data.spec import DataSpec, LoaderSpec
from proxynorm.errors import ConfigError, DataError
from proxynorm.files import cache_folder, locked

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# Over all pixels of the 60,000 training images, 28x28, on the 0..1 scale (population standard
# deviation).
MEAN, STD = (0.2860,), (0.3530,)
SIDE = 28
COUNTS = {"train": 60_000, "t10k": 10_000}
KINDS = ("images-idx3", "labels-idx1")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "apt-get install dataset-fashion-mnist"


def open_fashion_mnist(spec: DataSpec, loader: LoaderSpec) -> tuple[MemoryReader, MemoryReader]:
    """Return the readers of both parts. Raises ConfigError for options unfit for these images."""
    sides = (spec.image_size, spec.eval_size or spec.image_size, spec.start_size or spec.image_size)
    if spec.augmentation == "inception" or spec.randaugment is not None or min(sides) < SIDE:
        raise ConfigError(
            "Fashion-MNIST takes data.augmentation=pad_crop or none, no randaugment, and sides of "
            f"at least {SIDE} pixels (data.image_size, data.eval_size): its images are padded"
        )
    folder = find_fashion_mnist(spec.root, spec.cache)
    readers = []
    for part in COUNTS:
        images, labels = read_fashion_mnist(folder, part)
        readers.append(MemoryReader(images[..., None], labels, CLASSES, f"{folder}/{part}"))
    return readers[0], readers[1]


def find_fashion_mnist(root: str | None, cache: str | None) -> Path:
    """Return the folder of the four IDX files: root, else Debian's, else a download to the cache.

    Raises DataError if root lacks a file, or if nothing is installed and the download fails.
    """
    base = DEBIAN_FOLDER if root is None else Path(root).expanduser()
    if root is None and not base.is_dir():
        from torchvision.datasets import FashionMNIST

        base = cache_folder(cache)
        try:
            with locked(base / "fashion-mnist.lock"):  # all processes of a run get here at once
                FashionMNIST(str(base), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Fashion-MNIST is not installed and cannot be downloaded ({first_line(error)}); "
                f"{PACKAGE}"
            ) from None
    for folder in (base, base / "FashionMNIST" / "raw"):
        if all(_file(folder, part, kind) for part in COUNTS for kind in KINDS):
            return folder
    raise DataError(
        f"{base}: no such folder, or without Fashion-MNIST's four files "
        f"(train-images-idx3-ubyte.gz, …); give data.root, or omit it and {PACKAGE}"
    )


def _file(folder: Path, part: str, kind: str) -> Path | None:
    paths = (folder / f"{part}-{kind}-ubyte{suffix}" for suffix in (".gz", ""))
    return next(filter(Path.is_file, paths), None)


def read_fashion_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 (N, 28, 28) and labels int64 (N,) of part "train" or "t10k".

    Raises DataError for a damaged file.
    """
    shapes = (COUNTS[part], SIDE, SIDE), (COUNTS[part],)
    images, labels = (
        _read_idx(_file(folder, part, kind), shape) for kind, shape in zip(KINDS, shapes)
    )
    return images, labels.astype(np.int64)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file of unsigned bytes: big-endian magic 0x0800 + rank, the sides, the bytes."""
    head = np.array([0x0800 + len(shape), *shape], dtype=">u4").tobytes()
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
        if not data.startswith(head):
            raise ValueError("the header is another one")
        return np.frombuffer(data, dtype=np.uint8, offset=len(head)).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        sides = "x".join(map(str, shape))
        raise DataError(
            f"{path}: is not an IDX file of {sides} bytes ({first_line(error)}); download it again"
        ) from None
