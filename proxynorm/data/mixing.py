"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): timm's, random by (seed, step) alone."""

from __future__ import annotations

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target

from proxynorm.data.randomness import sample_keys
from proxynorm.errors import ConfigError


class Mixing:
    """Mixes a micro-batch with its own reverse, with one weight for all of it, and softens the targets to match.

    mixup_alpha, cutmix_alpha: the Beta distributions' parameters, 0: off; prob: probability that a micro-batch is
    mixed; switch_prob: probability of CutMix where both are on; smoothing: label smoothing. Raises ConfigError.
    """

    def __init__(
        self,
        mixup_alpha: float,
        cutmix_alpha: float,
        prob: float,
        switch_prob: float,
        smoothing: float,
        num_classes: int,
    ) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
            raise ConfigError(
                f"mixup_alpha={mixup_alpha} cutmix_alpha={cutmix_alpha}: none may be negative, one must be above 0"
            )
        for name, value in (("prob", prob), ("switch_prob", switch_prob), ("smoothing", smoothing)):
            if not 0 <= value <= 1:
                raise ConfigError(f"mixing: {name}={value}: give a number from 0 to 1")
        self.num_classes, self.smoothing = num_classes, smoothing
        self.mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=prob,
            switch_prob=switch_prob,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, seed: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Floating-point images (N, C, H, W), changed in place, targets int64 (N,) -> images, targets (N, classes).

        The same (seed, step) mixes alike. Of an odd number the last image stays unmixed. ConfigError if N is 1.
        """
        if len(images) < 2:
            raise ConfigError("mixup and CutMix need at least two images a micro-batch; give a larger micro_batch")
        even = len(images) // 2 * 2
        # timm draws from NumPy's global generator; it is put back for whoever else uses it.
        state = np.random.get_state()
        np.random.seed(int(sample_keys(seed, step, np.zeros(1))[0]) % (1 << 32))
        try:
            _, mixed = self.mixup(images[:even], targets[:even])
        finally:
            np.random.set_state(state)
        last = mixup_target(targets[even:], self.num_classes, smoothing=self.smoothing)
        return images, torch.cat([mixed, last])
