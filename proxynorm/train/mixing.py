"""timm's mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), drawn from (seed, step) alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target, rand_bbox

from proxynorm.data.randomness import sample_keys, seeded
from proxynorm.errors import ConfigError
from proxynorm.train.settings import RegularizationSettings

# The constants of CutMix in the authors' code: see own_share.
SLOPE, OFFSET, DEPTH = 1.55, 0.96, 4.0


class Mixing:
    """Mixes the images and targets of a micro-batch with those of the same batch in reverse order.

    One weight serves the whole micro-batch. cutmix_lambda is λ of the authors' CutMix, which
    replaces timm's and is applied after mixup. Raises ConfigError.
    """

    def __init__(self, given: RegularizationSettings, num_classes: int) -> None:
        smallest, nominal = OFFSET / SLOPE, given.cutmix_lambda
        if nominal is not None and (given.cutmix or not smallest <= nominal < 1):
            raise ConfigError(
                f"cutmix_lambda={nominal} cutmix={given.cutmix}: give one of them, "
                f"cutmix_lambda from {smallest:.2f} to below 1"
            )
        self.num_classes, self.given = num_classes, given
        self.mixup = Mixup(
            given.mixup,
            given.cutmix,
            prob=given.mix_probability,
            switch_prob=given.switch_probability,
            label_smoothing=given.label_smoothing,
            num_classes=num_classes,
        )
        # With both off, timm would raise an error instead of smoothing the labels alone.
        self.mixup.mixup_enabled = max(given.mixup, given.cutmix) > 0

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, seed: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix floating-point images (N, C, H, W), in place, and targets, int64 (N,).

        Returns the images and targets (N, classes), which depend on (seed, step) alone. timm mixes
        pairs, so it does not mix the last image of an odd number.
        """
        even = len(images) // 2 * 2
        with seeded(int(sample_keys(seed, step, np.zeros(1))[0])):
            _, mixed = self.mixup(images[:even], targets[:even])
            smoothing = self.given.label_smoothing
            last = mixup_target(targets[even:], self.num_classes, smoothing=smoothing)
            soft = torch.cat([mixed, last])
            if self.given.cutmix_lambda is not None:
                soft = paste(images, soft, own_share(self.given.cutmix_lambda))
        return images, soft


def own_share(nominal: float) -> float:
    """Draw the share of each image that keeps its own pixels, as the authors do for λ = `nominal`.

    It is 1 (no CutMix) with probability 1.55 λ − 0.96, else 1 + ln(u) / 4, u uniform on (e⁻⁴, 1).
    """
    if np.random.rand() < SLOPE * nominal - OFFSET:
        return 1.0
    # Not quite 0, because timm cannot draw the position of a box as large as the image.
    return max(1e-9, 1 + math.log(np.random.uniform(math.exp(-DEPTH), 1)) / DEPTH)


def paste(images: torch.Tensor, targets: torch.Tensor, share: float) -> torch.Tensor:
    """Paste a box from another image into each image, in place, leaving `share` of the area.

    images: (N, C, H, W); targets: (N, classes). Returns the targets weighted by the box's area.
    """
    # As in the authors' code, a margin of half the box keeps it inside, so its area is as drawn.
    top, bottom, left, right = rand_bbox(images.shape, share, margin=0.5)
    area = (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    # From two images before, as in the authors' code, because mixup has mixed in another one.
    distance = 2 if len(images) > 2 else 1
    box = images[:, :, top:bottom, left:right]
    box.copy_(box.roll(distance, dims=0))
    return (1 - area) * targets + area * targets.roll(distance, dims=0)
