"""Norms with affine, u = norm(x)·scale + shift, as fused.py calls them.

- forward returns u and the statistics: mean and 1/sqrt(var + ε).
- replay computes u again with these statistics, equal up to rounding.
- backward returns the gradients of x (None without needs_dx), scale and shift.
- reference computes u in operations that can be differentiated twice.

x, u and their gradients are (N, C, H, W) in x's dtype. scale and shift are (C,), in float32 or
better, like the statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupNorm:
    """LN, GN and IN with torch's kernel.

    It is for dense maps on CPU, and for contiguous maps on CUDA that are not in half precision.
    """

    groups: int
    eps: float

    @staticmethod
    def of(x: Tensor, groups: int, eps: float) -> GroupNorm | None:
        """The kernel for x; None if plain operations must be used."""
        if prefers_cells(x):
            return CellGroupNorm(groups, eps)
        # before 2.14, torch itself calls this kernel on dense maps only
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        return GroupNorm(groups, eps) if dense else None

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return aten.native_group_norm(x, scale, shift, *_sides(x), self.groups, self.eps)

    def replay(self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        if x.is_contiguous():  # here it is faster than broadcasting the statistics
            return self.forward(x, scale, shift)[0]
        return _on_cells(x, scale, shift, mean, rstd)

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        # As in autograd's formula: the kernel assumes that grad has x's memory format.
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad = grad.contiguous(memory_format=layout)
        return aten.native_group_norm_backward(
            grad, x, mean, rstd, scale, *_sides(x), self.groups, [needs_dx, True, True]
        )

    def reference(
        self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        u = F.group_norm(x.to(scale.dtype), self.groups, scale, shift, self.eps)
        return u.to(x.dtype)


def prefers_cells(x: Tensor) -> bool:
    """True if torch's group norm would lose x's memory format or the statistics' precision.

    On CUDA it returns NCHW, and rounds the statistics of half-precision maps.
    """
    return x.is_cuda and (x.dtype in (torch.float16, torch.bfloat16) or not x.is_contiguous())


class CellGroupNorm(GroupNorm):
    """LN, GN and IN in any memory format with float32 statistics.

    u = x·A + B with A and B (N, C), one value per cell (sample and channel), in float32. The map is
    read and written in its own dtype.
    """

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grouped, dims = x.unflatten(1, (self.groups, -1)), (2, 3, 4)
        mean = grouped.mean(dims, dtype=scale.dtype)
        # With out=, the kernel reads half precision and accumulates in float32. It centres the
        # values first; E[x²] − E[x]² would lose the variance of values far from 0.
        var = torch.var(grouped, dims, correction=0, out=torch.empty_like(mean))
        rstd = torch.rsqrt(var + self.eps)
        return _on_cells(x, scale, shift, mean, rstd), mean, rstd

    def replay(self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return _on_cells(x, scale, shift, mean, rstd)

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        mean, rstd = _to_cells(mean, x), _to_cells(rstd, x)
        y = torch.addcmul((-mean * rstd)[..., None, None], x, rstd[..., None, None])
        by_shift, by_scale = grad.sum((2, 3), dtype=mean.dtype), y.mul_(grad).sum((2, 3))
        dx = None
        if needs_dx:  # grad·A + x·D + E, one value per cell each
            size = x[0].numel() // self.groups
            mean_grad, mean_product = (
                _to_cells((s * scale).unflatten(1, (self.groups, -1)).sum(-1) / size, x)
                for s in (by_shift, by_scale)
            )
            d = -rstd * rstd * mean_product
            e = -rstd * mean_grad - d * mean
            dx = torch.addcmul(e[..., None, None], x, d[..., None, None])
            dx = torch.addcmul(dx, grad, (rstd * scale)[..., None, None], out=torch.empty_like(x))
        return dx, by_scale.sum(0), by_shift.sum(0)


def _on_cells(x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """u in x's dtype and memory format; mean and rstd are (N, groups)."""
    a = _to_cells(rstd, x) * scale
    b = shift - _to_cells(mean, x) * a
    return torch.addcmul(b[..., None, None], x, a[..., None, None], out=torch.empty_like(x))


def _to_cells(statistic: Tensor, x: Tensor) -> Tensor:
    """(N, groups) → (N, C)."""
    return statistic.repeat_interleave(x.shape[1] // statistic.shape[1], dim=1)


def _sides(x: Tensor) -> tuple[int, int, int]:
    """N, C, H·W of x."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


@dataclass(frozen=True)
class BatchNorm:
    """BN over the whole batch or, if training is False, with the running statistics.

    In training, running_mean and running_var are updated with momentum, unless they are None.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float

    @staticmethod
    def of(x: Tensor, norm_batch: int | str | None, **options: Any) -> BatchNorm | None:
        """The kernel for x; None if plain operations must be used."""
        whole = norm_batch is None or (isinstance(norm_batch, int) and norm_batch >= len(x))
        # with one value per channel, F.batch_norm raises the error for the user
        is_supported = not options["training"] or (whole and x.numel() > x.shape[1])
        return BatchNorm(**options) if is_supported else None

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        running = self.running_mean, self.running_var
        mean, var = (s if s is None else s.to(scale.dtype) for s in running)
        if not self.training and mean is not None and var is not None:
            # a copy, because the running statistics may be updated before backward
            statistics = mean.clone(), torch.rsqrt(var + self.eps)
            return self.replay(x, scale, shift, *statistics), *statistics
        result = aten.native_batch_norm(x, scale, shift, mean, var, True, self.momentum, self.eps)
        for statistic, updated in zip(running, (mean, var)):
            if statistic is not None and updated is not None:
                statistic.copy_(updated)
        return result

    def replay(self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        var = rstd.pow(-2)  # ε included
        return aten.native_batch_norm(x, scale, shift, mean, var, False, 0.0, 0.0)[0]

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        wanted = [needs_dx, True, True]
        return aten.native_batch_norm_backward(
            grad, x, scale, mean, rstd.pow(-2), mean, rstd, self.training, 0.0, wanted
        )

    def reference(
        self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        if self.training:
            return F.batch_norm(x, None, None, scale, shift, True, 0.0, self.eps)
        return F.batch_norm(x, mean, rstd.pow(-2), scale, shift, False, 0.0, 0.0)


Kernel = GroupNorm | BatchNorm
