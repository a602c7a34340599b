"""The normalizations themselves, without affine: BN with its normalization batch, LN, GN, IN.

Statistics are float32 or better whatever autocast says; the map keeps its dtype.
"""
from __future__ import annotations

from typing import Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

NormBatch = Union[int, str, None]


def group_normalize(x: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """Normalizes x (N, C, H, W) per sample and group of C / groups channels. groups = 1 is LN, groups = C is IN."""
    with torch.autocast(x.device.type, enabled=False):
        return F.group_norm(x, groups, eps=eps)


def batch_normalize(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool,
                    momentum: float = 0.1, eps: float = 1e-5, norm_batch: NormBatch = None) -> Tensor:
    """Normalizes x (N, C, H, W) per channel.

    In training the statistics are those of norm_batch consecutive images (None: of all of x; "global": of all
    processes' x together), and the running statistics move by momentum towards their average over the chunks. Where
    norm_batch does not divide N, the images left over are a last, smaller chunk. Otherwise the running statistics
    are used.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not training:
            return F.batch_norm(x, running_mean, running_var, eps=eps)
        if norm_batch == "global" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return _global_batch_normalize(x, running_mean, running_var, momentum, eps)
        if isinstance(norm_batch, int) and norm_batch < len(x):
            return _chunk_normalize(x, running_mean, running_var, momentum, eps, norm_batch)
        return F.batch_norm(x, running_mean, running_var, training=True, momentum=momentum, eps=eps)


def _chunk_normalize(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float,
                     size: int) -> Tensor:
    """All whole chunks at once, as a fifth dimension; then the smaller chunk of what is left over, if any."""
    whole = len(x) // size * size
    parts = [x[:whole].unflatten(0, (-1, size))] + ([x[whole:].unsqueeze(0)] if whole < len(x) else [])
    normalized, means, variances = zip(*(_normalize_chunks(part, eps) for part in parts))
    _update_running(running_mean, running_var, torch.cat(means).mean(0), torch.cat(variances).mean(0), momentum)
    return torch.cat(normalized).to(x.dtype)


def _normalize_chunks(part: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(K, images, C, H, W) → (K·images, C, H, W), and the chunks' means and unbiased variances, (K, C)."""
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    count = part[0, :, 0].numel()
    if count == 1:
        raise ValueError("bn over a chunk of one image with a 1×1 map has one value per channel and so no variance: "
                         "use a larger norm_batch, or one that divides the batch")
    var, mean = torch.var_mean(part, dim=(1, 3, 4), correction=0, keepdim=True)
    y = (part - mean) * torch.rsqrt(var + eps)
    unbiased = var.detach() * (count / (count - 1))
    return y.flatten(0, 1), mean.detach().flatten(1), unbiased.flatten(1)


def _global_batch_normalize(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float,
                            eps: float) -> Tensor:
    from torch.distributed.nn.functional import all_reduce  # differentiable, unlike torch.distributed.all_reduce

    wide = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.to(wide), dim=(0, 2, 3), correction=0)
    var, mean = var.double(), mean.double()
    local = x.numel() // x.shape[1]
    count = torch.full((1,), float(local), dtype=torch.float64, device=x.device)
    total = all_reduce(torch.cat([mean * local, (var + mean * mean) * local, count]))
    mean, square = (total[:-1] / total[-1]).chunk(2)
    var = (square - mean * mean).clamp_min(0)
    unbiased = var * total[-1] / (total[-1] - 1)
    _update_running(running_mean, running_var, mean.detach(), unbiased.detach(), momentum)
    rstd = torch.rsqrt(var + eps)
    shape = (1, -1, 1, 1)
    return ((x - mean.to(wide).view(shape)) * rstd.to(wide).view(shape)).to(x.dtype)


def _update_running(running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor,
                    momentum: float) -> None:
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(var.to(running_var.dtype), momentum)
