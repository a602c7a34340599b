"""update_bn: running statistics of averaged weights, for NormAct2d and torch's batch norm."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim import swa_utils

from proxynorm import convert, update_bn
from proxynorm.nn import NormAct2d


def test_it_does_what_torchs_does_for_batch_norm() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    batches = [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(3)]
    ours = convert(copy.deepcopy(original), "bn").eval()
    swa_utils.update_bn(batches, original)
    update_bn(ours, batches)
    assert isinstance(ours[1], NormAct2d) and not ours.training and ours[1].momentum == 0.1
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours[1], name), getattr(original[1], name))


def test_batch_independent_norms_are_left_alone() -> None:
    model = nn.Sequential(NormAct2d(3, "ln_pn"))
    update_bn(model, iter(()))
    assert model.training
