"""update_bn: running statistics of averaged weights, for NormAct2d and torch's batch norm."""

from __future__ import annotations

import copy

import pytest
import timm
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


@pytest.mark.parametrize(
    "tool, instead",
    [
        (lambda model: swa_utils.update_bn([torch.randn(2, 3, 8, 8)], model), r"update_bn\(model"),
        (nn.SyncBatchNorm.convert_sync_batchnorm, 'norm_batch="global"'),
        (timm.utils.freeze, r"call eval\(\)"),
    ],
)
@pytest.mark.parametrize("norm", ["bn", "bn_pn"])
def test_tools_that_know_batch_norm_by_class_warn(tool, instead: str, norm: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(NormAct2d(4, norm)))
    with pytest.warns(UserWarning, match=f"leaves NormAct2d as it is: .*{instead}"):
        tool(model)
    assert isinstance(model[1][0], NormAct2d)


def test_batch_independent_norms_are_skipped_in_silence(recwarn) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct2d(4, "ln_pn"))
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not recwarn.list
