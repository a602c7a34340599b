"""Group norm in any memory format with float32 statistics, where torch's own kernel has neither.

On CUDA torch's group norm returns NCHW, and rounds the statistics of half-precision maps. Here
u = x·A + B with A and B (N, C), one value per cell (sample and channel), in float32. The map is
read and written in its own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def prefers_cells(x: Tensor) -> bool:
    """True if torch's group norm would lose x's memory format or its statistics' precision."""
    return x.is_cuda and (x.dtype in (torch.float16, torch.bfloat16) or not x.is_contiguous())


class CellGroupNorm(torch.autograd.Function):
    """scale·norm(x) + shift of x (N, C, H, W); scale and shift (C,) in float32 or better."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
        mean, rstd = _statistics(x, groups, eps, scale.dtype)
        a = _to_channels(rstd, x) * scale
        b = shift - _to_channels(mean, x) * a
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        return torch.addcmul(b[..., None, None], x, a[..., None, None], out=torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, scale, shift, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: torch's own operations can be differentiated again
            u = F.group_norm(x.to(scale.dtype), ctx.groups, scale, shift, ctx.eps).to(x.dtype)
            wanted = [t for t in (x, scale, shift) if t.requires_grad]
            slopes = iter(torch.autograd.grad(u, wanted, grad, create_graph=True))
            return (
                *(next(slopes) if t.requires_grad else None for t in (x, scale, shift)),
                None,
                None,
            )
        return *_cell_backward(grad, x, scale, *statistics, ctx.groups), None, None


def _statistics(x: Tensor, groups: int, eps: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and 1/sqrt(var + eps), each (N, groups), without a wide copy of x."""
    grouped, dims = x.unflatten(1, (groups, -1)), (2, 3, 4)
    mean = grouped.mean(dims, dtype=wide)
    # out= lets the kernel read half precision and accumulate in float32. It centres the values
    # first: E[x²] − E[x]² would lose the variance of values that are far from 0.
    var = torch.var(grouped.detach(), dims, correction=0, out=torch.empty_like(mean))
    return mean, torch.rsqrt(var + eps)


def _cell_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = grad·A + x·D + E with A, D, E (N, C), and the gradients of scale and shift."""
    mean, rstd = _to_channels(mean, x), _to_channels(rstd, x)
    total, product = _cell_sums(grad, x, mean, rstd)
    size = x[0].numel() // groups
    mean_grad, mean_product = (
        _to_channels((s * scale).unflatten(1, (groups, -1)).sum(-1) / size, x)
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
        product = torch.addcmul((-mean * rstd)[..., None, None], x, rstd[..., None, None]).mul_(
            grad
        )
        return grad.sum((2, 3), dtype=mean.dtype), product.sum((2, 3))
    # these sums are the parameter gradients of a batch norm whose channels are the cells: one pass
    flat = (1, mean.numel(), *x.shape[2:])
    mean_flat, rstd_flat = mean.flatten(), rstd.flatten()
    _, product, total = torch.ops.aten.native_batch_norm_backward(
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
