"""The norms: the registry of names, and BN with its normalization batch, LN, GN and IN.

Statistics are float32 or better, also under autocast; the map keeps its dtype. To add a norm, write
its function, add it to _NORMALIZATIONS and create configs/norm/NAME.yaml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from proxynorm.nn.checks import unknown_name
from proxynorm.nn.fast.fused import NormAct
from proxynorm.nn.fast.kernels import BatchNorm, CellGroupNorm, GroupNorm, Kernel, prefers_cells
from proxynorm.nn.fast.precision import needs_plain_operations, without_autocast

NormBatch = int | str | None


def group_normalize(
    x: Tensor,
    groups: int,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Normalize x (N, C, H, W) per sample and group of C / groups channels.

    groups = 1 is LN, groups = C is IN.
    """
    with without_autocast(x.device):
        if needs_plain_operations():
            return _in_plain_operations(x, 1, groups, eps, weight, bias)[0]
        if not prefers_cells(x):
            return F.group_norm(x, groups, weight, bias, eps)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight.to(dtype)
        bias = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias.to(dtype)
        norm, act = CellGroupNorm(groups, eps), nn.Identity()
        return NormAct.apply(x, norm, act, None, None, weight, bias)


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
    """Normalize x (N, C, H, W) per channel.

    In training, each chunk of norm_batch consecutive images has its own statistics (None: one chunk
    of all N; "global": the images of all processes together). The running statistics move by
    momentum towards the average over the chunks. If norm_batch does not divide N, the last chunk is
    smaller. In evaluation the running statistics are used.
    """
    with without_autocast(x.device):
        size = norm_batch if isinstance(norm_batch, int) else len(x)
        is_shared = norm_batch == "global" and dist.is_available() and dist.is_initialized()
        mean: Tensor | None
        var: Tensor | None
        if training and is_shared and dist.get_world_size() > 1:
            y, mean, var = _normalize_globally(x, eps, weight, bias)
        # Compilers and torch.func get _chunk_norm's plain operations, with all images as one chunk.
        elif training and (0 < size < len(x) or (needs_plain_operations() and len(x) > 0)):
            y, mean, var = _normalize_chunks(x, size, eps, weight, bias)
        else:
            # F.batch_norm needs the running statistics in the dtype of the affine (x's or float32).
            dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
            mean, var = (s if s is None else s.to(dtype) for s in (running_mean, running_var))
            y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
            momentum = 1.0  # F.batch_norm updated mean and var: they replace the old ones below
        for statistic, moved in ((running_mean, mean), (running_var, var)):
            if training and statistic is not None and moved is not None and moved is not statistic:
                statistic.lerp_(moved.to(statistic.dtype), momentum)
        return y


def _in_plain_operations(
    x: Tensor, images: int, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm over `images` images and C / groups channels at a time, for compilers.

    Returns y, and mean and population variance, each (N / images, groups). Everything that is
    combined with the map has one value per cell (image and channel), so a compiler needs two passes
    forward (statistics, output) and two backward (sums over each cell, gradient).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Mean and variance of the cells, then of their groups. Unlike E[x²] − E[x]², this is exact even
    # if the mean is much larger than the deviation.
    cell_var, cell_mean = torch.var_mean(wide, dim=(2, 3), correction=0)
    grouped = (x.shape[0] // images, images, groups, x.shape[1] // groups)
    cell_var, cell_mean = cell_var.view(grouped), cell_mean.view(grouped)
    mean = cell_mean.mean((1, 3), keepdim=True)
    var = (cell_var + (cell_mean - mean).square()).mean((1, 3), keepdim=True)
    # x·A + B reads fewer tensors than (x − mean)·A + β, which the compiler would store.
    a, mean_of_cell = (
        t.expand(grouped).reshape(x.shape[:2]) for t in (torch.rsqrt(var + eps), mean)
    )
    a = a if weight is None else a * weight
    b = -mean_of_cell * a if bias is None else bias - mean_of_cell * a
    y = wide * a[..., None, None] + b[..., None, None]
    return y.to(x.dtype), mean.flatten(1), var.flatten(1)


def affine(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **_: object
) -> Tensor:
    """γ·x + β per channel, without statistics: the norm named "none"."""
    x = x if weight is None else x * weight.view(1, -1, 1, 1)
    return x if bias is None else x + bias.view(1, -1, 1, 1)


def _normalize_chunks(
    x: Tensor, size: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """BN of each chunk of `size` images; also the average of their means and unbiased variances."""
    whole = len(x) // size * size
    parts = [(x[:whole], size), (x[whole:], len(x) - whole)] if whole < len(x) else [(x, size)]
    y, mean, var = zip(*(_chunk_norm(part, images, eps, weight, bias) for part, images in parts))
    return torch.cat(y) if len(y) > 1 else y[0], torch.cat(mean).mean(0), torch.cat(var).mean(0)


def _chunk_norm(
    x: Tensor, images: int, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """BN of each chunk of `images` images; also the means and unbiased variances, (chunks, C)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    chunks, channels = len(x) // images, x.shape[1]
    if needs_plain_operations():
        y, mean, var = _in_plain_operations(x, images, channels, eps, weight, bias)
        count = x.numel() // (chunks * channels)
        return y, mean.detach(), var.detach() * (count / max(count - 1, 1))
    # A single batch norm over chunks · C channels replaces one for every chunk. With momentum 1,
    # its "running" statistics become the mean and unbiased variance.
    mean, var = x.new_zeros(2, chunks * channels, dtype=dtype)
    weight, bias = (t if t is None else t.repeat(chunks) for t in (weight, bias))
    side_by_side = x.unflatten(0, (chunks, -1)).transpose(0, 1).flatten(1, 2)
    y = F.batch_norm(side_by_side, mean, var, weight, bias, True, 1.0, eps)
    y = y.unflatten(1, (chunks, -1)).transpose(0, 1).flatten(0, 1)
    # Back into x's memory format; the copies above are contiguous.
    y = y if x.is_contiguous() else y.clone(memory_format=torch.channels_last)
    return y, mean.view(chunks, -1), var.view(chunks, -1)


def _normalize_globally(
    x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """BN over the images of all processes; also their mean and unbiased variance, (C,)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # In double, because E[x²] − E[x]² below cancels if the mean is large.
    var, mean = (s.double() for s in torch.var_mean(x.to(dtype), dim=(0, 2, 3), correction=0))
    local = x.numel() // x.shape[1]
    count = torch.full((1,), float(local), dtype=torch.float64, device=x.device)
    # Sums instead of means, because processes may hold different numbers of images.
    total = _AllReduce.apply(torch.cat([mean * local, (var + mean * mean) * local, count]))
    mean, square = (total[:-1] / total[-1]).chunk(2)
    var = (square - mean * mean).clamp_min(0)
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    y = affine(x, scale.to(dtype), shift.to(dtype)).to(x.dtype)
    total_count = total[-1].detach()
    return y, mean.detach(), var.detach() * total_count / (total_count - 1)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes. Its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad)


def _gn_groups(channels: int, groups: int | None) -> int:
    """The given number of groups, otherwise the largest divisor of channels that is at most 32."""
    return groups or max(g for g in range(1, min(32, channels) + 1) if channels % g == 0)


@dataclass(frozen=True)
class NormSpec:
    """An entry of the registry of norms."""

    kind: str  # "bn", "ln", "gn", "in", or "none", which normalizes nothing
    # normalize(x, groups=, eps=, weight=, bias=) with x of shape (N, C, H, W); a norm with batch
    # statistics takes batch_normalize's arguments
    normalize: Callable[..., Tensor]
    # kernel(x, groups=, eps=), or with batch_normalize's options, returns the same norm for use in
    # NormAct, the autograd Function of norm, activation and PN; None: use plain operations
    kernel: Callable[..., Kernel | None] | None = None
    # returns the number of groups for C and the option `groups`; None: a norm without groups
    groups: Callable[[int, int | None], int] | None = None
    batch_statistics: bool = False  # statistics over the batch; running ones in evaluation
    proxy: bool = False  # proxy normalization follows the activation
    weight_standardization: bool = False  # the convolutions before it have standardized weights


_NORMALIZATIONS = {
    "bn": NormSpec("bn", batch_normalize, BatchNorm.of, batch_statistics=True),
    "ln": NormSpec("ln", group_normalize, GroupNorm.of, groups=lambda channels, groups: 1),
    "gn": NormSpec("gn", group_normalize, GroupNorm.of, groups=_gn_groups),
    "in": NormSpec("in", group_normalize, GroupNorm.of, groups=lambda channels, groups: channels),
}
_SPECS = {
    **_NORMALIZATIONS,
    **{f"{kind}_pn": replace(spec, proxy=True) for kind, spec in _NORMALIZATIONS.items()},
    **{
        f"{kind}_ws{suffix}": replace(spec, weight_standardization=True, proxy=bool(suffix))
        for kind, spec in _NORMALIZATIONS.items()
        if kind in ("ln", "gn")
        for suffix in ("", "_pn")
    },
    "none": NormSpec("none", affine),
}
NORMS: tuple[str, ...] = tuple(_SPECS)


def norm_spec(name: str) -> NormSpec:
    """The registry entry of a norm. Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in _SPECS:
        raise ValueError(unknown_name("norm", name, NORMS))
    return _SPECS[name]
