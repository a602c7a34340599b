"""Fashion-MNIST (arXiv 1708.07747): finds its files and holds its images in memory."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from proxynorm.data.cache import cache_folder
from proxynorm.data.loaders import Failures
from proxynorm.data.readers import MemoryReader
from proxynorm.data.spec import DataSpec, LoaderSpec
from proxynorm.errors import ConfigError, DataError

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# Over all pixels of the 60,000 training images, 28x28, on the 0..1 scale (population standard
# deviation).
MEAN, STD = (0.2860,), (0.3530,)
SIDE = 28
COUNTS = {"train": 60_000, "t10k": 10_000}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "apt-get install dataset-fashion-mnist"


def open_fashion_mnist(
    spec: DataSpec, loader: LoaderSpec, failures: Failures
) -> tuple[MemoryReader, MemoryReader]:
    """Return the readers of both parts. Raises ConfigError for what grey images do not allow."""
    if spec.augmentation == "inception":
        raise ConfigError(
            "data.augmentation=inception is for photographs; Fashion-MNIST takes pad_crop or none"
        )
    if spec.randaugment is not None:
        raise ConfigError(
            "randaugment is for photographs in colour (data=folder); Fashion-MNIST has none"
        )
    sides = (spec.image_size, spec.eval_size or spec.image_size, spec.start_size or spec.image_size)
    if min(sides) < SIDE:
        raise ConfigError(
            f"Fashion-MNIST's images are {SIDE} pixels wide and are padded, not shrunk: give "
            f"data.image_size and data.eval_size of at least {SIDE}"
        )
    folder = find_fashion_mnist(spec.root, cache_folder(spec.cache))
    train, evaluation = (_open_part(folder, part) for part in COUNTS)
    return train, evaluation


def _open_part(folder: Path, part: str) -> MemoryReader:
    images, labels = read_fashion_mnist(folder, part)
    return MemoryReader(images[..., None], labels, CLASSES, f"{folder}/{part}")


def find_fashion_mnist(root: str | None, cache: Path) -> Path:
    """Return the folder of the four IDX files: root, else Debian's, else a download into cache.

    Raises DataError if root lacks a file, or if nothing is installed and nothing can be downloaded.
    """
    if root is not None:
        return _complete_folder(Path(root).expanduser())
    if DEBIAN_FOLDER.is_dir():
        return _complete_folder(DEBIAN_FOLDER)
    return _download(cache)


def _complete_folder(root: Path) -> Path:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give data.root, or none and {PACKAGE}")
    for folder in (root, root / "FashionMNIST" / "raw"):
        if all(
            _file(folder, part, kind) for part in COUNTS for kind in ("images-idx3", "labels-idx1")
        ):
            return folder
    raise DataError(
        f"{root}: lacks Fashion-MNIST's four files (train-images-idx3-ubyte.gz, …); give "
        f"data.root, or {PACKAGE}"
    )


def _file(folder: Path, part: str, kind: str) -> Path | None:
    for suffix in (".gz", ""):
        path = folder / f"{part}-{kind}-ubyte{suffix}"
        if path.is_file():
            return path
    return None


def _download(cache: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"Fashion-MNIST is not installed and cannot be downloaded ({reason}); {PACKAGE}"
        ) from None
    return _complete_folder(cache)


def read_fashion_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 (N, 28, 28) and labels int64 (N,) of part "train" or "t10k".

    Raises DataError for a damaged file.
    """
    images = _read_idx(_file(folder, part, "images-idx3"), (COUNTS[part], SIDE, SIDE))
    labels = _read_idx(_file(folder, part, "labels-idx1"), (COUNTS[part],))
    if labels.max() >= len(CLASSES):
        raise DataError(
            f"{folder}: {part} holds the label {labels.max()}; Fashion-MNIST has {len(CLASSES)} "
            f"classes"
        )
    return images, labels.astype(np.int64)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file of unsigned bytes: big-endian magic 0x0800 + rank, the sides, the bytes."""
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch it again") from None
    expected = np.array([0x0800 + len(shape), *shape], dtype=">u4").tobytes()
    if data[: len(expected)] != expected or len(data) != len(expected) + int(np.prod(shape)):
        raise DataError(
            f"{path}: is not the IDX file of {'x'.join(map(str, shape))} bytes it should be; "
            f"fetch it again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=len(expected)).reshape(shape)
