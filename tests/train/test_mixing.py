"""Mixup and CutMix: targets sum to one, CutMix's area is its weight, and the mixture depends on
(seed, step) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proxynorm.errors import ConfigError
from proxynorm.train.mixing import Mixing, own_share
from proxynorm.train.settings import RegularizationSettings


def mixing(mixup=0.0, cutmix=0.0, smoothing=0.0, classes=4, **keys):
    keys = {"mixup": mixup, "cutmix": cutmix, "label_smoothing": smoothing, **keys}
    return Mixing(RegularizationSettings(**keys), classes)


def batch(count):
    """All pixels of image n are n, so a mixture shows its weights. Its target is n modulo 4."""
    numbers = torch.arange(count)
    return numbers.float().view(-1, 1, 1, 1).repeat(1, 3, 32, 32), numbers % 4


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


def test_mixing_depends_on_seed_and_step_alone_and_keeps_the_global_generator():
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    runs = {key: mixing(0.5, 0.5)(*batch(8), *key)[1] for key in ((0, 0), (0, 1), (1, 0))}
    assert np.random.rand() == expected
    assert torch.equal(runs[0, 0], mixing(0.5, 0.5)(*batch(8), 0, 0)[1])
    assert not torch.equal(runs[0, 0], runs[0, 1]) and not torch.equal(runs[0, 0], runs[1, 0])


@pytest.mark.parametrize("nominal", [0.95, 0.9, 0.85, 0.8])
def test_the_authors_shares_follow_their_formulas(nominal):
    """1 with probability 1.55 λ − 0.96; else 1 + ln(u)/4, whose distribution function is
    (e^(4 s) − 1) / (e⁴ − 1)."""
    np.random.seed(0)
    shares = np.array([own_share(nominal) for _ in range(20_000)])
    assert np.mean(shares == 1) == pytest.approx(1.55 * nominal - 0.96, abs=0.012)
    cut = shares[shares < 1]
    for share in (0.25, 0.5, 0.75, 0.9):
        expected = (np.exp(4 * share) - 1) / (np.exp(4) - 1)
        assert np.mean(cut < share) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("count", [2, 7, 8])
def test_the_authors_cutmix_weighs_targets_by_the_area_of_its_box(count):
    uncut = 0
    for step in range(300):
        images, targets = mixing(cutmix_lambda=0.9)(*batch(count), seed=2, step=step)
        distance = 2 if count > 2 else 1
        own = [float((image == n).float().mean()) for n, image in enumerate(images)]
        assert own == pytest.approx([own[0]] * count)
        uncut += own[0] == 1
        for n, image in enumerate(images):
            pasted = (n - distance) % count
            assert ((image == n) | (image == pasted)).all()
            assert float(targets[n, n % 4]) == pytest.approx(
                own[n] + (1 - own[n]) * (pasted % 4 == n % 4), abs=1e-6
            )
        assert torch.allclose(targets.sum(1), torch.ones(count))
    # A share of 1.55 · 0.9 − 0.96 = 0.435, and the few boxes smaller than a pixel.
    assert 0.36 < uncut / 300 < 0.52


def test_the_authors_cutmix_comes_on_top_of_mixup():
    """An image's channels are its target, so both show the same mixture of up to four images."""
    weights = torch.eye(8)
    seen = set()
    for step in range(60):
        images = weights.view(8, 8, 1, 1).expand(-1, -1, 32, 32).clone()
        mixer = mixing(0.5, classes=8, cutmix_lambda=0.8)
        images, targets = mixer(images, torch.arange(8), seed=0, step=step)
        assert torch.allclose(images.mean(dim=(2, 3)), targets, atol=1e-5)
        seen.add(int((targets > 1e-6).sum(1).max()))
    assert {2, 4} <= seen


def test_the_authors_cutmix_depends_on_seed_and_step_alone():
    runs = {key: mixing(cutmix_lambda=0.8)(*batch(8), *key)[0] for key in ((0, 1), (0, 2), (1, 1))}
    assert torch.equal(runs[0, 1], mixing(cutmix_lambda=0.8)(*batch(8), 0, 1)[0])
    assert not torch.equal(runs[0, 1], runs[0, 2]) and not torch.equal(runs[0, 1], runs[1, 1])


def test_prob_is_the_share_of_mixed_batches():
    mixer = mixing(mixup=1.0, mix_probability=0.3)
    mixed = [float(mixer(*batch(2), 0, step)[1].max(1).values.min()) < 1 for step in range(500)]
    assert 0.24 < np.mean(mixed) < 0.36


@pytest.mark.parametrize(
    "keys", [{"cutmix": 1.0, "cutmix_lambda": 0.9}, {"cutmix_lambda": 1.0}, {"cutmix_lambda": 0.5}]
)
def test_impossible_values_are_refused(keys):
    with pytest.raises(ConfigError, match="cutmix_lambda"):
        mixing(**keys)


@pytest.mark.parametrize("keys", [{"mixup": 1.0}, {"cutmix": 1.0}, {"cutmix_lambda": 0.9}])
def test_a_single_image_stays_unmixed(keys):
    """All others of its micro-batch are damaged."""
    images, targets = batch(1)
    before = images.clone()
    mixed, soft = mixing(**keys)(images, targets, 0, 0)
    assert torch.equal(mixed, before) and soft.argmax(1).equal(targets)
    assert soft.sum().item() == pytest.approx(1)
