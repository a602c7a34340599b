"""Norms with affine, as fused.py calls them: forward, backward, and forward again in backward.

x, u and gradients of maps are (N, C, H, W) in the map's dtype; scale and shift are (C,) in float32
or better, as the statistics are. cells.py has one more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


class Kernel(ABC):
    """u = norm(x)·scale + shift. The statistics are those that forward returned."""

    @abstractmethod
    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, and the statistics: mean and 1/sqrt(var + ε)."""

    @abstractmethod
    def again(self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """u once more, to rounding."""

    @abstractmethod
    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, by_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradients of x (None without by_x), scale and shift from u's."""

    @abstractmethod
    def reference(
        self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        """u in operations that can be differentiated twice."""


@dataclass(frozen=True)
class GroupNorm(Kernel):
    """LN, GN and IN by torch's kernel, for dense maps on CPU and contiguous ones on CUDA."""

    groups: int
    eps: float

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return aten.native_group_norm(x, scale, shift, *_sides(x), self.groups, self.eps)

    def again(self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        if x.is_contiguous():  # faster than to broadcast over contiguous maps
            return self.forward(x, scale, shift)[0]
        a = rstd.unsqueeze(2) * scale.view(self.groups, -1)
        b = shift.view(self.groups, -1) - mean.unsqueeze(2) * a
        return on_cells(x, a.flatten(1), b.flatten(1))

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, by_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad = grad.contiguous(memory_format=layout)
        return aten.native_group_norm_backward(
            grad, x, mean, rstd, scale, *_sides(x), self.groups, [by_x, True, True]
        )

    def reference(
        self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        u = F.group_norm(x.to(scale.dtype), self.groups, scale, shift, self.eps)
        return u.to(x.dtype)


@dataclass(frozen=True)
class BatchNorm(Kernel):
    """BN over the whole batch, or (training False) with the running statistics.

    Training moves running_mean and running_var, where there are any, by momentum.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        running = self.running_mean, self.running_var
        mean, var = (s if s is None else s.to(scale.dtype) for s in running)
        if not self.training and mean is not None and var is not None:
            # of its own: the running statistics may move before backward
            statistics = mean.clone(), torch.rsqrt(var + self.eps)
            return self.again(x, scale, shift, *statistics), *statistics
        done = aten.native_batch_norm(x, scale, shift, mean, var, True, self.momentum, self.eps)
        for statistic, moved in zip(running, (mean, var)):
            if statistic is not None and moved is not None:
                statistic.copy_(moved)
        return done

    def again(self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        var = rstd.pow(-2)  # ε included
        return aten.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0)[0]

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, by_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        wanted = [by_x, True, True]
        return aten.native_batch_norm_backward(
            grad, x, scale, mean, rstd.pow(-2), mean, rstd, self.training, 0.0, wanted
        )

    def reference(
        self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        if self.training:
            return F.batch_norm(x, None, None, scale, shift, True, 0.0, self.eps)
        return F.batch_norm(x, mean, rstd.pow(-2), scale, shift, False, 0.0, 0.0)


def on_cells(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x·a + b with a and b (N, C), in x's dtype and memory format."""
    return torch.addcmul(b[..., None, None], x, a[..., None, None], out=torch.empty_like(x))


def _sides(x: Tensor) -> tuple[int, int, int]:
    """N, C, H·W of x."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
