"""The order, crops and flips depend on (seed, epoch, index) alone; every count is exact."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from proxynorm.data import DataSpec, LoaderSpec, open_data
from proxynorm.data.augment import CROP_RATIO, Transform, random_boxes
from proxynorm.data.randomness import permutation, sample_keys, uniform
from proxynorm.data.readers import Job
from proxynorm.errors import ConfigError
from tests.data.conftest import BACKENDS, needs_ffcv, write_folder


def opened(photos, cache, backend, workers=2, **keys):
    keys = {"image_size": 32, "augmentation": "inception", **keys}
    spec = DataSpec("folder", root=str(photos), cache=cache, **keys)
    return open_data(spec, LoaderSpec(backend, workers))


def batches(data, epoch=0, batch=12, micro_batch=4, seed=5, start_step=0, **order):
    return list(data.train_loader(batch, micro_batch, seed, **order).epoch(epoch, start_step))


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right) for a, b in zip(x, y)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_workers_gives_the_same_bits(photos, cache, backend):
    one, two = (batches(opened(photos, cache, backend, workers)) for workers in (0, 2))
    assert same(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_decoded_in_advance_are_the_same_bits(photos, cache, backend):
    spec = DataSpec("folder", root=str(photos), cache=cache, augmentation="inception")
    loaders = [LoaderSpec(backend, 2, prefetch) for prefetch in (0, 1, 9)]
    on_request, ahead, far = (batches(open_data(spec, loader)) for loader in loaders)
    assert same(on_request, ahead) and same(on_request, far)


@needs_ffcv
@pytest.mark.parametrize("prefetch, begun", [(0, 1), (2, 3), (None, 4)])
def test_ffcv_decodes_as_many_batches_in_advance_as_asked(photos, cache, prefetch, begun):
    spec = DataSpec("folder", root=str(photos), cache=cache, image_size=32)
    data = open_data(spec, LoaderSpec("ffcv", 1, prefetch))
    drawn = []
    job = Job(np.arange(8), np.zeros(8, dtype=np.uint64), 32)
    jobs = (drawn.append(n) or job for n in range(6))
    next(data.train.reader.stream(jobs, Transform(spec)))
    assert len(drawn) == begun


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeking_equals_running_through(photos, cache, backend):
    data = opened(photos, cache, backend)
    assert same(batches(data, epoch=2)[3:], batches(data, epoch=2, start_step=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_has_the_same_images_for_any_number_of_processes(photos, cache, backend, world_size):
    data = opened(photos, cache, backend, workers=0)
    whole = batches(data, micro_batch=12)
    share = 12 // world_size
    ranks = [
        batches(data, micro_batch=share, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [[torch.cat(parts) for parts in zip(*step)] for step in zip(*ranks)]
    assert same(whole, joined)


@pytest.mark.parametrize("backend", BACKENDS)
def test_epochs_and_seeds_differ_and_each_image_comes_once(photos, cache, backend):
    data = opened(photos, cache, backend, workers=0)
    runs = [batches(data, epoch=0), batches(data, epoch=1), batches(data, epoch=0, seed=6)]
    orders = [torch.cat([batch.indices for batch in run]).tolist() for run in runs]
    assert all(sorted(order) == list(range(36)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    crops = [
        {int(i): image for batch in run for i, image in zip(batch.indices, batch.images)}
        for run in runs
    ]
    assert not any(torch.equal(crops[0][i], other[i]) for other in crops[1:] for i in range(36))


@needs_ffcv
def test_both_backends_take_the_same_crops(photos, cache):
    """Decoders and resizing differ by rounding only. Another crop or flip would differ far more."""
    ours, theirs = (batches(opened(photos, cache, backend)) for backend in ("ffcv", "torchvision"))
    for a, b in zip(ours, theirs):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.targets, b.targets)
        difference = (a.images.float() - b.images.float()).abs().mean(dim=(1, 2, 3))
        assert difference.max() < 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_deterministic_differs_from_run_to_run_in_crops_only(photos, cache, backend):
    first, second = (batches(opened(photos, cache, backend, deterministic=False)) for _ in range(2))
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(first, second))
    assert not any(torch.equal(a.images, b.images) for a, b in zip(first, second))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_an_epoch_early_leaves_nothing_running(photos, cache, backend):
    before = threading.active_count()
    loader = opened(photos, cache, backend).train_loader(4, 4, seed=0)
    kept = next(loader.epoch(0))
    running = loader.epoch(1)
    first = next(running)
    copy = first.images.clone()
    running.close()
    deadline = time.monotonic() + 20  # torch's workers end their queues' threads a moment later
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
    assert torch.equal(first.images, copy) and len(kept.targets) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_not_recycled_buffers(photos, cache, backend):
    run = batches(opened(photos, cache, backend))
    again = batches(opened(photos, cache, backend))
    assert same(run, again) and len({batch.images.data_ptr() for batch in run}) == len(run)


@pytest.fixture(scope="module")
def hundred_and_one(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("101"), 1, 33)
    for n in (1, 2):
        source = root / "val" / "ant" / "000.jpg"
        (root / "val" / "bee" / f"copy{n}.jpg").write_bytes(source.read_bytes())
    return root


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 16, 250])
def test_evaluation_counts_every_image_once(
    hundred_and_one, cache, backend, world_size, batch_size
):
    data = opened(hundred_and_one, cache, backend, workers=0)
    loaders = [data.eval_loader(batch_size, rank, world_size) for rank in range(world_size)]
    ranks = [list(loader) for loader in loaders]
    assert len({len(batches) for batches in ranks}) == 1
    assert len({len(batch.targets) for batches in ranks for batch in batches}) == 1
    _, targets, indices, valid = (torch.cat(part) for part in zip(*itertools.chain(*ranks)))
    seen, order = indices[valid].sort()
    assert seen.tolist() == list(range(101)) and data.info.eval_count == 101
    assert targets[valid][order].tolist() == [0] * 33 + [1] * 35 + [2] * 33


def test_batch_sizes_that_cannot_be_are_refused(photos, cache):
    data = opened(photos, cache, "torchvision")
    cases = ((0, 1, 1), (4, 0, 1), (10, 4, 1), (12, 4, 2), (48, 48, 1))
    for batch, micro_batch, world_size in cases:
        with pytest.raises(ConfigError, match=f"batch={batch}"):
            data.train_loader(batch, micro_batch, seed=0, world_size=world_size)
    with pytest.raises(ConfigError, match="at least 1"):
        next(data.eval_loader(0))


def test_progressive_resizing_grows_in_multiples_of_32(photos, cache):
    keys = {"image_size": 192, "start_size": 128, "ramp": (2, 6), "eval_size": 224}
    data = opened(photos, cache, "torchvision", 0, **keys)
    loader = data.train_loader(4, 4, seed=0)
    sizes = [loader.image_size(epoch) for epoch in range(8)]
    assert sizes == [128, 128, 128, 128, 160, 192, 192, 192]
    assert next(loader.epoch(4)).images.shape == (4, 3, 160, 160)
    for image_size, start_size in ((32, 8), (192, 140), (50, 40)):
        loader.data.spec = replace(data.spec, image_size=image_size, start_size=start_size)
        sizes = [loader.image_size(epoch) for epoch in range(8)]
        assert (sizes[0], sizes[7]) == (start_size, image_size) and sizes == sorted(sizes)
    assert next(iter(data.eval_loader(2))).images.shape == (2, 3, 224, 224)


def test_the_generator_is_splitmix64():
    """The published first outputs for seed 1234567 (Rosetta Code, "Pseudo-random
    numbers/Splitmix64")."""
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    numbers = uniform(np.array([1234567], dtype=np.uint64), np.arange(3))
    assert numbers.tolist() == [(number >> 11) * 2.0**-53 for number in published]


def test_random_numbers_are_uniform_and_uncorrelated():
    keys = sample_keys(0, 0, np.arange(100_000))
    numbers = np.stack([uniform(keys, counter) for counter in range(4)])
    assert np.abs(numbers.mean(axis=1) - 0.5).max() < 0.005
    assert np.abs(numbers.var(axis=1) - 1 / 12).max() < 0.002
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < 0.02
    assert sorted(permutation(1, 2, 1000)) == list(range(1000))


def test_inception_crops_follow_their_distribution_and_fit():
    count = 50_000
    keys = sample_keys(0, 0, np.arange(count))
    heights, widths = np.full(count, 375), np.full(count, 500)
    boxes = random_boxes(keys, heights, widths, (0.08, 1.0), CROP_RATIO, 16)
    top, left, height, width = boxes.T
    assert top.min() >= 0 and (top + height).max() <= 375
    assert left.min() >= 0 and (left + width).max() <= 500
    area, ratio = height * width / (375 * 500), width / height
    assert area.min() > 0.079 and area.max() <= 1 and ratio.min() > 0.72 and ratio.max() < 1.36
    small = area < 0.5  # every box of this size fits, so here the area is uniform
    assert abs(area[small].mean() - 0.29) < 0.01
    each = [
        random_boxes(keys[n : n + 1], heights[:1], widths[:1], (0.08, 1.0), CROP_RATIO, 16)
        for n in range(500)
    ]
    assert np.array_equal(np.concatenate(each), boxes[:500])
