"""Group norm in any memory format with float32 statistics, where torch's own kernel has neither.

On CUDA torch's group norm returns NCHW, and rounds the statistics of half-precision maps. Here
u = x·A + B with A and B (N, C), one value per cell (sample and channel), in float32. The map is
read and written in its own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from proxynorm.nn.fast.kernels import GroupNorm, aten, on_cells


def prefers_cells(x: Tensor) -> bool:
    """True if torch's group norm would lose x's memory format or its statistics' precision."""
    return x.is_cuda and (x.dtype in (torch.float16, torch.bfloat16) or not x.is_contiguous())


@dataclass(frozen=True)
class CellGroupNorm(GroupNorm):
    """LN, GN and IN on CUDA, in half precision and channels_last."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Kernel.forward; without a wide copy of x."""
        grouped, dims = x.unflatten(1, (self.groups, -1)), (2, 3, 4)
        mean = grouped.mean(dims, dtype=scale.dtype)
        # out= lets the kernel read half precision and accumulate in float32. It centres the values
        # first: E[x²] − E[x]² would lose the variance of values that are far from 0.
        var = torch.var(grouped, dims, correction=0, out=torch.empty_like(mean))
        rstd = torch.rsqrt(var + self.eps)
        return self.again(x, scale, shift, mean, rstd), mean, rstd

    def again(self, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        a = _to_channels(rstd, x) * scale
        return on_cells(x, a, shift - _to_channels(mean, x) * a)

    def backward(
        self, grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, by_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """dx = grad·A + x·D + E with A, D, E (N, C), and the gradients of scale and shift."""
        mean, rstd = _to_channels(mean, x), _to_channels(rstd, x)
        total, product = _cell_sums(grad, x, mean, rstd)
        dx = None
        if by_x:
            size = x[0].numel() // self.groups
            mean_grad, mean_product = (
                _to_channels((s * scale).unflatten(1, (self.groups, -1)).sum(-1) / size, x)
                for s in (total, product)
            )
            d = -rstd * rstd * mean_product
            e = -rstd * mean_grad - d * mean
            dx = torch.addcmul(e[..., None, None], x, d[..., None, None])
            dx = torch.addcmul(dx, grad, (rstd * scale)[..., None, None], out=torch.empty_like(x))
        return dx, product.sum(0), total.sum(0)


def _cell_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the positions of every cell of grad and of grad·norm(x), (N, C)."""
    if not (x.is_contiguous() and grad.is_contiguous()):
        product = torch.addcmul((-mean * rstd)[..., None, None], x, rstd[..., None, None])
        product = product.mul_(grad).sum((2, 3))
        return grad.sum((2, 3), dtype=mean.dtype), product
    # these sums are the parameter gradients of a batch norm whose channels are the cells: one pass
    flat = (1, mean.numel(), *x.shape[2:])
    mean_flat, rstd_flat = mean.flatten(), rstd.flatten()
    _, product, total = aten.native_batch_norm_backward(
        grad.view(flat),
        x.view(flat),
        torch.ones_like(rstd_flat),
        None,
        None,
        mean_flat,
        rstd_flat,
        True,
        0.0,
        [False, True, True],
    )
    return total.view_as(mean), product.view_as(mean)


def _to_channels(statistic: Tensor, x: Tensor) -> Tensor:
    """(N, groups) → (N, C)."""
    return statistic.repeat_interleave(x.shape[1] // statistic.shape[1], dim=1)
