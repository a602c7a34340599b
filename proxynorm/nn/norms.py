"""The normalizations themselves: BN with its normalization batch, LN, GN, IN; an affine only where one is handed in.

Statistics are float32 or better whatever autocast says; the map keeps its dtype.
"""

from __future__ import annotations

from typing import Any, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from proxynorm.nn.fast.cells import CellGroupNorm, prefers_cells
from proxynorm.nn.fast.fused import is_transformed
from proxynorm.nn.fast.precision import without_autocast

NormBatch = Union[int, str, None]


def group_normalize(
    x: Tensor,
    groups: int,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Normalizes x (N, C, H, W) per sample and group of C / groups channels. groups = 1 is LN, groups = C is IN."""
    with without_autocast(x.device):
        if not prefers_cells(x):
            return F.group_norm(x, groups, weight, bias, eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = x.new_ones(x.shape[1], dtype=wide) if weight is None else weight.to(wide)
        bias = x.new_zeros(x.shape[1], dtype=wide) if bias is None else bias.to(wide)
        if is_transformed():
            return F.group_norm(x.to(wide), groups, weight, bias, eps).to(x.dtype)
        return CellGroupNorm.apply(x, weight, bias, groups, eps)


def batch_normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    norm_batch: NormBatch = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Normalizes x (N, C, H, W) per channel.

    In training the statistics are those of norm_batch consecutive images (None: of all of x; "global": of all
    processes' x together), and the running statistics move by momentum towards their average over the chunks. Where
    norm_batch does not divide N, the images left over are a last, smaller chunk. Otherwise the running statistics
    are used.
    """
    with without_autocast(x.device):
        if not training:
            return _batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
        if isinstance(norm_batch, int) and norm_batch < len(x):
            return _normalize_chunks(
                x, running_mean, running_var, momentum, eps, norm_batch, weight, bias
            )
        if (
            norm_batch == "global"
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        ):
            return _normalize_globally(x, running_mean, running_var, momentum, eps, weight, bias)
        return _batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """F.batch_norm, whose running statistics must have the affine's precision (x's, or float32), for those of any other too."""
    running = (running_mean, running_var)
    dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
    cast = [s if s is None else s.to(dtype) for s in running]
    y = F.batch_norm(x, *cast, weight, bias, training, momentum, eps)
    if training:
        for statistic, moved in zip(running, cast):
            if moved is not statistic:
                statistic.copy_(moved)
    return y


def _normalize_chunks(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = x.new_zeros(2, -(-len(x) // size), x.shape[1], dtype=wide)
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    # momentum 1 leaves a chunk's own mean and unbiased variance in its "running" statistics
    y = torch.cat(
        [
            F.batch_norm(chunk, m, v, weight, bias, True, 1.0, eps)
            for chunk, m, v in zip(x.split(size), mean, var)
        ]
    )
    _update_running(running_mean, running_var, mean.mean(0), var.mean(0), momentum)
    return y


def _normalize_globally(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    var, mean = (s.double() for s in torch.var_mean(x.to(wide), dim=(0, 2, 3), correction=0))
    local = x.numel() // x.shape[1]
    count = torch.full((1,), float(local), dtype=torch.float64, device=x.device)
    total = _AllReduce.apply(torch.cat([mean * local, (var + mean * mean) * local, count]))
    mean, square = (total[:-1] / total[-1]).chunk(2)
    var = (square - mean * mean).clamp_min(0)
    unbiased = var * total[-1] / (total[-1] - 1)
    _update_running(running_mean, running_var, mean.detach(), unbiased.detach(), momentum)
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return (x * scale.to(wide).view(1, -1, 1, 1) + shift.to(wide).view(1, -1, 1, 1)).to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum of a tensor over all processes, differentiable: its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad)


def _update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
) -> None:
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(var.to(running_var.dtype), momentum)
