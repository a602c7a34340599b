"""Activation calls are removed from a forward's source, also on Python 3.10."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from proxynorm import convert
from proxynorm.conversion import rewrite
from tests.helpers import with_random_norms


class Block(nn.Module):
    """Activations as functions, a method and a module, one of them behind a sum as well."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.leaky_relu(self.bns[0](self.convs[0](x)), 0.2)
        y = self.bns[1](self.convs[1](y)).relu_()
        y = self.relu(self.bns[2](self.convs[2](y)))
        return self.relu(y - x)


class OneLine(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bns[1](F.relu(self.bns[0](self.convs[0](x)))))
        return F.relu(self.bns[2](y)) - x


@pytest.fixture(params=[False, True], ids=["columns", "lines"])
def lines_only(request, monkeypatch) -> bool:
    """Python 3.10 knows the line of a running call alone; hide what later versions know."""
    if request.param:
        monkeypatch.setattr(rewrite, "_call_end", lambda frame: (frame.f_lineno, None))
    return request.param


@pytest.mark.parametrize("kind", [Block, OneLine])
def test_calls_are_found_by_their_position_or_refused(kind: type, lines_only: bool) -> None:
    torch.manual_seed(0)
    original = with_random_norms(kind())
    model = copy.deepcopy(original)
    if lines_only and kind is OneLine:
        with pytest.raises(
            ValueError, match=r"test_rewrite\.py:\d+ .*cannot be distinguished from others"
        ):
            convert(model, "bn")
        return
    convert(model, "bn")
    assert all(layer.apply_act for layer in model.bns)
    images = torch.randn(2, 3, 8, 8)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(images), original.train(training)(images))
