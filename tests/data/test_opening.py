"""open_data: folders and .beton files, ours and FFCV's. Mistakes and damage are one clear line."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from proxynorm.data import DataSpec, LoaderSpec, open_data
from proxynorm.data.ffcv.beton import RAW, manifest_path, read_beton
from proxynorm.data.ffcv.writer import prepare
from proxynorm.data.images import StorageOptions
from proxynorm.data.opening import share_of_cores
from proxynorm.data.sources import list_source
from proxynorm.errors import ConfigError, DataError
from tests.data.conftest import (
    BACKENDS,
    CLASSES,
    change_byte,
    needs_ffcv,
    photograph,
    remove_companions,
    write_betons,
    write_folder,
)


def opened(root, cache, backend, name="folder", **keys):
    spec = DataSpec(name, root=str(root), cache=str(cache), **keys)
    return open_data(spec, LoaderSpec(backend, workers=0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_gives_its_classes_and_labels(photos, cache, backend):
    data = opened(photos, cache, backend)
    assert data.backend == backend and data.info.classes == ("ant", "bee", "cow")
    assert (data.info.train_count, data.info.eval_count, data.info.channels) == (36, 12, 3)
    targets = torch.cat([batch.targets for batch in data.eval_loader(5)])[:12]
    assert targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_takes_the_centre_at_the_stated_ratio(tmp_path, backend):
    """The inner 80 % of the photograph's sides are white: a smaller ratio sees only white."""
    root = write_folder(tmp_path / "data", 1, 1, ("one",))
    frame = np.zeros((200, 300, 3), dtype=np.uint8)
    frame[20:180, 70:230] = 255
    Image.fromarray(frame).save(root / "val" / "one" / "000.jpg", quality=100)
    for ratio, white in ((0.78, 1.0), (1.0, 0.64)):
        data = opened(root, tmp_path / "cache", backend, eval_ratio=ratio, eval_size=64)
        batch = next(data.eval_loader(1))
        assert batch.images.shape == (1, 3, 64, 64)
        assert batch.images.float().mean() / 255 == pytest.approx(white, abs=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "inception"])
def test_every_augmentation_works_on_a_folder(photos, cache, backend, augmentation):
    data = opened(photos, cache, backend, augmentation=augmentation, image_size=48)
    batch = next(data.train_loader(6, 3, seed=0).epoch(0))
    assert batch.images.shape == (3, 3, 48, 48) and batch.images.dtype == torch.uint8
    assert batch.valid.all()


def no_folder(root):
    shutil.rmtree(root)


def empty_class(root):
    (root / "train" / "ant" / "000.jpg").unlink()


def other_classes(root):
    (root / "val" / "cow").rename(root / "val" / "dog")


def no_val(root):
    shutil.rmtree(root / "val")


def not_an_image(root):
    (root / "train" / "bee" / "000.jpg").write_text("no image")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, message",
    [
        (no_folder, "data/train: no such folder"),
        (empty_class, "train/ant: class without images"),
        (other_classes, "different classes"),
        (no_val, "val: no such folder; data=folder reads train/CLASS"),
        (not_an_image, "train/bee/000.jpg: is not an image"),
    ],
)
def test_a_bad_folder_is_one_line(tmp_path, backend, change, message):
    root = write_folder(tmp_path / "data", 1, 1)
    change(root)
    with pytest.raises(DataError, match=message) as error:
        data = opened(root, tmp_path / "cache", backend)
        list(data.train_loader(3, 3, seed=0).epoch(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_torchvision_loader_skips_and_counts(tmp_path, workers):
    root = write_folder(tmp_path / "data", 3, 2)
    (root / "train" / "bee" / "001.jpg").write_bytes(b"")
    (root / "val" / "cow" / "000.jpg").write_bytes(b"rubbish")
    spec = DataSpec("folder", root=str(root), on_bad="skip", augmentation="inception")
    data = open_data(spec, LoaderSpec("torchvision", workers))
    loader = data.train_loader(9, 9, seed=0)
    for epoch in range(2):
        (batch,) = loader.epoch(epoch)
        assert sorted(batch.indices.tolist()) == [0, 1, 2, 3, 5, 6, 7, 8] and batch.valid.all()
    valid = torch.cat([batch.valid for batch in data.eval_loader(6)])
    assert valid.tolist() == [True] * 4 + [False, True]
    assert sorted(data.failures.values()) == ["is empty", "is not an image of a known format"]


@needs_ffcv
def test_conversion_skips_and_is_repeated_when_a_file_changes(tmp_path):
    root = write_folder(tmp_path / "data", 3, 1)
    assert opened(root, tmp_path / "cache", "ffcv").info.train_count == 9
    (root / "train" / "bee" / "001.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="train/bee/001.jpg: is empty"):
        opened(root, tmp_path / "cache", "ffcv")
    data = opened(root, tmp_path / "cache", "ffcv", on_bad="skip")
    assert data.info.train_count == 8
    assert list(data.failures) == [str(root / "train" / "bee" / "001.jpg")]
    again = opened(root, tmp_path / "cache", "ffcv", on_bad="skip")
    assert again.failures == data.failures


@pytest.fixture
def betons(photos, tmp_path):
    write_betons(photos, tmp_path)
    return tmp_path


@needs_ffcv
@pytest.mark.parametrize("sums", [True, False])
def test_an_image_damaged_after_preparation_stops_or_is_skipped(betons, sums):
    """It is found by its checksum or, in a file of FFCV's writer, by the decoder's status."""
    samples = read_beton(betons / "train.beton")
    if not sums:
        remove_companions(betons / "train.beton")
    with open(betons / "train.beton", "r+b") as file:
        file.seek(int(samples.pointer[4]) + 300)
        file.write(b"\xff\xd9" * 100)
    with pytest.raises(DataError, match="train.beton: image 4: .*on_bad=skip"):
        list(opened(betons, betons, "ffcv", "beton").train_loader(36, 36, seed=0).epoch(0))
    data = opened(betons, betons, "ffcv", "beton", on_bad="skip")
    (batch,) = data.train_loader(36, 36, seed=0).epoch(0)
    assert sorted(batch.indices.tolist()) == [n for n in range(36) if n != 4]
    assert len(data.failures) == 1


@needs_ffcv
def test_one_changed_bit_in_a_raw_image_is_found(photos, tmp_path):
    write_betons(photos, tmp_path, max_side=40)
    samples = read_beton(tmp_path / "train.beton")
    assert (samples.mode == RAW).all()
    change_byte(tmp_path / "train.beton", int(samples.pointer[7]) + 100)
    with pytest.raises(DataError, match="image 7: its stored bytes have changed"):
        list(opened(tmp_path, tmp_path, "ffcv", "beton").train_loader(36, 36, seed=0).epoch(0))


@needs_ffcv
def test_files_with_different_classes_are_refused(betons, tmp_path):
    other = write_folder(tmp_path / "other", 1, 1, ("ant", "bee", "dog"))
    (betons / "val.beton").unlink()
    prepare(list_source(other / "val"), betons / "val.beton", StorageOptions())
    with pytest.raises(DataError, match="different classes"):
        opened(betons, betons, "ffcv", "beton")


@needs_ffcv
def test_ffcv_reads_our_files_as_we_do(betons):
    """FFCV's own Loader, its centre crop and its labels."""
    from ffcv.fields.decoders import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    threads = torch.get_num_threads()
    loader = Loader(
        str(betons / "train.beton"),
        batch_size=36,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [CenterCropRGBImageDecoder((64, 64), 0.875)], "label": [IntDecoder()]},
    )
    images, labels = (np.array(part) for part in next(iter(loader)))
    keys = {"augmentation": "none", "image_size": 64, "eval_ratio": 0.875}
    (batch,) = opened(betons, betons, "ffcv", "beton", **keys).train_loader(36, 36, seed=0).epoch(0)
    order = batch.indices.numpy()
    # Ours resizes in integers, OpenCV in floating point: one step of 255 apart at most.
    assert np.abs(batch.images.permute(0, 2, 3, 1).numpy().astype(int) - images[order]).max() <= 1
    assert np.array_equal(batch.targets.numpy(), labels[order, 0])
    torch.set_num_threads(threads)


def test_no_image_crosses_a_page(photos, tmp_path, monkeypatch):
    """FFCV's page cache (os_cache=False) needs that, and whole pages."""
    monkeypatch.setattr("proxynorm.data.ffcv.writer.PAGE_SIZE", 1 << 15)
    monkeypatch.setattr("proxynorm.data.images.PAGE_SIZE", 1 << 15)
    options = StorageOptions(jpeg_probability=0.5)
    prepare(list_source(photos / "train"), tmp_path / "x.beton", options)
    samples = read_beton(tmp_path / "x.beton")
    assert (samples.pointer >> 15 == (samples.pointer + samples.size - 1) >> 15).all()
    assert len(set(samples.pointer >> 15)) > 5


class Photographs:
    """A source for FFCV's writer."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return photograph(index), index % 3


@needs_ffcv
def test_we_read_the_files_of_ffcvs_writer(tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    threads = torch.get_num_threads()
    for part, mode in (("train", "raw"), ("val", "jpg")):
        fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
        writer = DatasetWriter(str(tmp_path / f"{part}.beton"), fields, num_workers=2)
        writer.from_indexed_dataset(Photographs(), chunksize=3)
    torch.set_num_threads(threads)
    data = opened(tmp_path, tmp_path, "ffcv", "beton", augmentation="none", image_size=90)
    assert data.info.classes == ("0", "1", "2")
    (batch,) = data.train_loader(10, 10, seed=0).epoch(0)
    for image, index, target in zip(batch.images, batch.indices.tolist(), batch.targets):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), photograph(index)[:, 15:105])
        assert target == index % 3
    assert sum(int(batch.valid.sum()) for batch in data.eval_loader(4)) == 10


def test_randaugment_is_deterministic_and_torchvisions(photos, cache):
    def first(seed, randaugment="rand-m9-mstd0.5"):
        keys = {"augmentation": "inception", "image_size": 64, "randaugment": randaugment}
        data = opened(photos, cache, "torchvision", **keys)
        return next(data.train_loader(12, 12, seed=seed).epoch(0)).images

    assert torch.equal(first(0), first(0)) and not torch.equal(first(0), first(1))
    assert not torch.equal(first(0), first(0, randaugment=None))
    assert opened(photos, cache, "auto", randaugment="rand-m9").backend == "torchvision"


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_erasing_puts_the_mean_colour_in_one_box(photos, cache, backend):
    images = {}
    for erasing in (0.0, 1.0):
        keys = {"augmentation": "inception", "random_erasing": erasing, "image_size": 64}
        data = opened(photos, cache, backend, **keys)
        images[erasing] = next(data.train_loader(36, 36, seed=0).epoch(0)).images
    colour = (255 * torch.tensor(data.info.mean)).round().byte().view(3, 1, 1)
    for plain, erased in zip(images[0.0], images[1.0]):
        changed = (plain != erased).any(0)
        assert 0.01 < changed.float().mean() < 0.36
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (box == colour).all()


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "imagenet"},
        {"augmentation": "mixup"},
        {"on_bad": "ignore"},
        {"image_size": 0},
        {"eval_ratio": 1.5},
        {"limit": 0},
        {"holdout": -1},
        {"holdout": 36},
        {"start_size": 32},
        {"start_size": 16, "ramp": (1,)},
        {"start_size": 16, "ramp": (1, 2, 3)},
        {"start_size": 33, "ramp": (0, 2)},
        {"randaugment": "foo"},
        {"randaugment": "rand-foo"},
        {"randaugment": "rand-m9.5"},
        {"mean": (0.5,)},
        {"std": (0.2, 0.2, math.inf)},
        {"random_erasing": 2.0},
        {"root": None},
    ],
)
def test_impossible_values_are_refused(photos, cache, keys):
    spec = DataSpec(**{"name": "folder", "root": str(photos), "cache": cache, **keys})
    with pytest.raises(ConfigError) as error:
        open_data(spec, LoaderSpec("torchvision"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_limit_beyond_the_images_gives_a_warning(photos, cache, backend):
    assert opened(photos, cache, backend, limit=36).warnings == ()
    data = opened(photos, cache, backend, limit=1000, holdout=6)
    assert data.warnings == ("data.limit=1000 exceeds the 30 training images, which are all taken",)
    assert data.info.train_count == 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_class_is_said(tmp_path, cache, backend):
    root = write_folder(tmp_path, 4, 2, CLASSES[:1])
    (note,) = opened(root, cache, backend).warnings
    assert "train" in note and "has one class only" in note


@needs_ffcv
def test_a_file_without_manifest_gives_one_warning(betons):
    assert opened(betons, betons, "ffcv", "beton").warnings == ()
    for part in ("train", "val"):
        remove_companions(betons / f"{part}.beton")
    lines = opened(betons, betons, "ffcv", "beton").warnings
    for part, line in zip(("train", "val"), lines, strict=True):
        assert line.startswith(f"{betons}/{part}.beton: no manifest, so ")


@needs_ffcv
@pytest.mark.parametrize("damage", ["no manifest", "no companions", "another manifest"])
def test_a_converted_folder_without_its_manifest_is_converted_again(tmp_path, damage):
    root = write_folder(tmp_path / "data", 2, 1)
    opened(root, tmp_path / "cache", "ffcv")
    (path,) = (tmp_path / "cache").glob("folder-train-*.beton")
    if damage == "no manifest":
        manifest_path(path).unlink()
    elif damage == "no companions":
        remove_companions(path)
    else:
        (other,) = (tmp_path / "cache").glob("folder-val-*.beton")
        shutil.copy(manifest_path(other), manifest_path(path))
    data = opened(root, tmp_path / "cache", "ffcv")
    assert data.info.train_count == 6 and data.warnings == ()
    assert read_beton(path).manifest["count"] == 6


OPEN = (
    "import sys; from proxynorm.data import *; spec = DataSpec('folder', root=sys.argv[1], "
    "cache=sys.argv[2]); print(open_data(spec, LoaderSpec('ffcv', 1)).info.train_count)"
)


@needs_ffcv
def test_two_processes_may_open_an_empty_cache_at_once(photos, tmp_path):
    command = [sys.executable, "-c", OPEN, str(photos), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["36", "36"]
    assert len(list(tmp_path.glob("*.beton"))) == 2 and not list(tmp_path.glob(".*.tmp"))


def test_more_workers_than_cores_give_no_warning(photos, cache, recwarn):
    data = open_data(DataSpec("folder", root=str(photos)), LoaderSpec("torchvision", 5))
    assert sum(int(batch.valid.sum()) for batch in data.eval_loader(12)) == 12
    assert not [warning for warning in recwarn if "DataLoader" in str(warning.message)]


def test_an_unsuitable_backend_is_refused(photos, cache, monkeypatch):
    with pytest.raises(ConfigError, match="loader.name=torchvision cannot read data.name=beton"):
        opened(photos, cache, "torchvision", "beton")
    with pytest.raises(ConfigError, match="loader.name=dali: valid: auto, ffcv, torchvision"):
        opened(photos, cache, "dali")
    from proxynorm.data.ffcv import native

    native.ffcv_library.cache_clear()
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    try:
        assert opened(photos, cache, "auto").backend == "torchvision"
        with pytest.raises(ConfigError, match="FFCV is not installed"):
            opened(photos, cache, "ffcv")
    finally:
        native.ffcv_library.cache_clear()


NO_CACHE = """
from numba.core import caching
for name in dir(caching):
    if name.endswith(("InTreeCacheLocator", "UserWideCacheLocator")):
        getattr(caching, name).from_function = classmethod(lambda *_: None)
from proxynorm.data.ffcv.native import decoder
print(decoder().__name__)
"""


@needs_ffcv
def test_a_machine_where_numba_cannot_write_its_cache_still_decodes():
    command = [sys.executable, "-c", NO_CACHE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "decode_samples"


@pytest.mark.parametrize(
    ("cores", "environment", "share"),
    [
        (64, {}, 64),
        (64, {"LOCAL_WORLD_SIZE": "4", "RANK": "0"}, 16),  # torchrun: all workers see all cores
        (16, {"LOCAL_WORLD_SIZE": "4", "RANK": "0", "SLURM_CPUS_ON_NODE": "16"}, 4),
        (16, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "64"}, 16),  # task/affinity
        (64, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "64"}, 16),  # task/none
        (128, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "64"}, 16),  # half of the node
        (2, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "2"}, 1),
        (16, {"SLURM_CPUS_ON_NODE": "16"}, 16),
    ],
)
def test_cores_are_shared_once_among_the_processes_of_a_node(
    monkeypatch, cores, environment, share
):
    """Under SLURM the affinity may be the task's own already."""
    for name in ("LOCAL_WORLD_SIZE", "RANK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert share_of_cores() == share
