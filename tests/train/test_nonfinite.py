"""The report of a non-finite loss: the layers where it begins, and on which processes."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import nn

from proxynorm.paper.search import DIVERGED
from proxynorm.train.nonfinite import affected, describe


def test_modules_that_compute_nothing_are_not_reported():
    model = nn.Sequential(
        nn.Identity(),
        nn.Dropout(0.0),
        DropPath(0.0),
        nn.Conv2d(1, 2, 1),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
    )
    assert affected(model.train(), [torch.full((2, 1, 4, 4), float("nan"))], torch.float32) == [
        "the input images",
        "3",
        "4",
        "5",
    ]


def test_layers_and_processes_are_reported_together():
    def words(layers: list[list[str]]) -> str:
        return describe(6, 0, float("nan"), 1.0, 0.1, layers)

    many = words([["stem", "head"]] * 64)
    assert "not finite, first in stem, head of process 0, 1, 2, " in many
    mixed = words([["stem"], ["stem"], ["head"], [], ["stem"]])
    assert "first in stem, head of process 0, 1, 2, 4; the weights" in mixed
    alone = words([["stem"]])
    assert "first in stem; the weights" in alone and DIVERGED in alone, (
        "a search knows a diverged run by these words"
    )
    assert "every activation is finite" in words([[], []])
