"""Mixup and CutMix: targets sum to one, CutMix's area is its weight, the randomness is (seed, step)'s alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proxynorm.data.mixing import Mixing
from proxynorm.errors import ConfigError


def mixing(mixup=0.0, cutmix=0.0, prob=1.0, switch_prob=0.5, smoothing=0.0):
    return Mixing(mixup, cutmix, prob, switch_prob, smoothing, num_classes=4)


def batch(count):
    """Image n is n everywhere, so a mixture shows its weights; target n modulo 4."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).clone()
    return images, torch.arange(count) % 4


@pytest.mark.parametrize("count", [2, 7, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_sum_to_one_for_odd_and_even_batches(count, smoothing):
    for step in range(20):
        _, targets = mixing(0.2, 1.0, smoothing=smoothing)(*batch(count), seed=0, step=step)
        assert targets.shape == (count, 4)
        assert torch.allclose(targets.sum(1), torch.ones(count)) and targets.min() >= 0


def test_cutmix_area_is_the_weight_of_its_target():
    for step in range(50):
        images, targets = mixing(cutmix=1.0)(*batch(2), seed=1, step=step)
        own = (images[0] == 0).float().mean()
        assert own == pytest.approx(float(targets[0, 0]), abs=1e-6)


def test_mixup_weights_images_and_targets_alike():
    images, targets = mixing(mixup=1.0)(*batch(2), seed=1, step=3)
    assert torch.allclose(images[0], targets[0, 1].expand(3, 32, 32), atol=1e-6)
    assert 0 < targets[0, 1] < 1


def test_the_last_image_of_an_odd_batch_stays_unmixed():
    images, targets = mixing(mixup=1.0, smoothing=0.1)(*batch(3), seed=0, step=0)
    assert (images[2] == 2).all()
    assert targets[2].tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])


def test_randomness_is_of_seed_and_step_alone_and_disturbs_nobody():
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    runs = {key: mixing(0.5, 0.5)(*batch(8), *key)[1] for key in ((0, 0), (0, 1), (1, 0))}
    assert np.random.rand() == expected
    assert torch.equal(runs[0, 0], mixing(0.5, 0.5)(*batch(8), 0, 0)[1])
    assert not torch.equal(runs[0, 0], runs[0, 1]) and not torch.equal(runs[0, 0], runs[1, 0])


def test_prob_is_the_share_of_mixed_batches():
    mixed = [bool((mixing(mixup=1.0, prob=0.3)(*batch(2), 0, step)[1].max(1).values < 1).any()) for step in range(500)]
    assert 0.24 < np.mean(mixed) < 0.36


def test_impossible_values_are_refused():
    for bad in (
        lambda: mixing(),
        lambda: mixing(mixup=-1.0),
        lambda: mixing(1.0, prob=1.5),
        lambda: mixing(1.0)(*batch(1), 0, 0),
    ):
        with pytest.raises(ConfigError):
            bad()
