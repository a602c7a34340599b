"""Fashion-MNIST, held in memory: images and labels are those of the files, bit for bit."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from proxynorm.data import DataSpec, LoaderSpec, fashion_mnist, open_data
from proxynorm.errors import ConfigError, DataError
from tests.data.conftest import needs_fashion_mnist

pytestmark = needs_fashion_mnist


def opened(backend, cache, **keys):
    return open_data(DataSpec("fashion_mnist", cache=cache, **keys), LoaderSpec(backend, workers=2))


def epoch(data, epoch=0, batch=500, **order):
    batches = list(data.train_loader(batch, batch, seed=3, **order).epoch(epoch))
    return [torch.cat(parts) for parts in zip(*batches)]


@pytest.mark.parametrize("loader", ["auto", "ffcv", "torchvision"])
def test_it_is_held_in_memory_whatever_the_loader(cache, loader):
    try:
        data = opened(loader, cache, limit=3000)
    except ConfigError as error:
        assert loader == "ffcv" and "not installed" in str(error)
    else:
        assert data.backend == "memory" and not list(Path(cache).glob("fashion*"))
        assert len(epoch(data)[0]) == 3000


def test_evaluation_delivers_the_stored_images_and_labels(cache):
    images, labels = fashion_mnist.read_fashion_mnist(fashion_mnist.DEBIAN_FOLDER, "t10k")
    data = opened("auto", cache)
    seen = [torch.cat(parts) for parts in zip(*data.eval_loader(999))]
    valid = seen[3]
    assert valid.sum() == data.info.eval_count == 10_000
    framed = seen[0][valid][:, 0]
    assert np.array_equal(framed[:, 2:30, 2:30].numpy(), images)
    framed[:, 2:30, 2:30] = 0
    assert not framed.any()
    assert np.array_equal(seen[1][valid].numpy(), labels)
    assert np.array_equal(seen[2][valid].numpy(), np.arange(10_000))
    assert (seen[2][~valid] == -1).all() and not seen[0][~valid].any()


def test_every_crop_is_a_window_of_the_padded_image(cache):
    images, labels = fashion_mnist.read_fashion_mnist(fashion_mnist.DEBIAN_FOLDER, "train")
    batch = next(opened("torchvision", cache).train_loader(64, 64, seed=0).epoch(0))
    places, mirrored = set(), 0
    for crop, target, index in zip(batch.images[:, 0].numpy(), batch.targets, batch.indices):
        assert target == labels[index]
        padded = np.pad(images[index], 6)
        found = [
            (top, left, step == -1)
            for step in (1, -1)
            for top in range(9)
            for left in range(9)
            if np.array_equal(padded[top : top + 32, left : left + 32][:, ::step], crop)
        ]
        assert found
        places.add(found[0][:2])
        mirrored += found[0][2]
    assert len(places) > 30 and 15 < mirrored < 49


def test_normalized_images_have_mean_zero_and_variance_one(cache):
    data = opened("torchvision", cache, image_size=28, augmentation="none")
    everything = next(data.train_loader(60_000, 60_000, seed=0).epoch(0))
    batch = data.prepare(everything, "cpu", torch.float64)
    assert batch.images.mean().abs() < 1e-3 and (batch.images.std() - 1).abs() < 1e-3
    assert data.info.mean == (0.2860,) and data.info.std == (0.3530,)


def test_prepare_gives_the_asked_type_and_layout(cache):
    data = opened("torchvision", cache)
    batch = next(iter(data.eval_loader(8)))
    batch = data.prepare(batch, "cpu", torch.bfloat16, torch.channels_last)
    assert batch.images.dtype == torch.bfloat16
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_prepare_keeps_everything_on_the_device_it_is_given(cache):
    """The meta device stands in for an accelerator: an operand left on the CPU would be refused."""
    data = opened("torchvision", cache)
    batch = data.prepare(next(iter(data.eval_loader(8))), "meta", torch.float16)
    assert batch.images.device.type == batch.targets.device.type == "meta"
    assert batch.indices.device.type == batch.valid.device.type == "cpu", "not used on the device"
    assert batch.images.dtype == torch.float16


def test_limit_and_holdout_are_disjoint_and_fixed(cache):
    everything = opened("torchvision", cache, limit=1000)
    held = opened("torchvision", cache, limit=1000, holdout=500)
    train, same = (set(epoch(data)[2].tolist()) for data in (everything, held))
    kept = {int(index) for batch in held.eval_loader(100) for index in batch.indices}
    assert train == same and len(train) == 1000
    assert len(kept) == 500 and not kept & train
    assert held.info.eval_count == 500 and held.info.train_count == 1000
    assert opened("torchvision", cache, holdout=500).info.train_count == 59_500


def damaged_copy(tmp_path, name, change):
    root = tmp_path / "copy"
    shutil.copytree(fashion_mnist.DEBIAN_FOLDER, root)
    change(root / name)
    return str(root)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1000])


def other_magic(path):
    path.write_bytes(gzip.compress(b"\0\0\x08\x04" + gzip.decompress(path.read_bytes())[4:], 1))


@pytest.mark.parametrize(
    "change", [shorten, other_magic, lambda path: path.unlink(), lambda path: path.write_bytes(b"")]
)
@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"])
def test_damaged_files_are_one_line(tmp_path, name, change):
    root = damaged_copy(tmp_path, name, change)
    with pytest.raises(DataError, match=str(root)) as error:
        open_data(DataSpec("fashion_mnist", root=root, cache=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_missing_root_and_small_crops_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_data(DataSpec("fashion_mnist", root=str(tmp_path / "none"), cache=str(tmp_path)))
    with pytest.raises(ConfigError, match="at least 28"):
        open_data(DataSpec("fashion_mnist", image_size=24, cache=str(tmp_path)))


def test_importing_the_package_loads_neither_ffcv_nor_numba():
    heavy = {"ffcv", "numba", "cv2", "torchvision"}
    program = f"import sys, proxynorm.data; print({heavy} & set(sys.modules))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
