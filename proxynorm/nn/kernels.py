"""The norms with affine, forward and backward, on PyTorch's own kernels; what the fused step is built from.

Each class maps (x, scale, shift) to u = scale·norm(x) + shift and the statistics that its backward needs, all
without autograd. Maps keep their dtype and memory format; statistics, scale and shift are float32 (or float64).
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

aten = torch.ops.aten
Statistics = tuple[Tensor, Tensor]


def per_channel(v: Tensor) -> Tensor:
    """(C,) as (1, C, 1, 1), to act on a map."""
    return v.view(1, -1, 1, 1)


@dataclass(frozen=True)
class GroupNorm:
    """LN, GN and IN: statistics (N, groups) per sample and group of channels."""

    groups: int
    eps: float

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Statistics]:
        if not _native(x):
            return _cell_forward(x, scale, shift, self.groups, self.eps)
        n, c, h, w = x.shape
        u, mean, rstd = aten.native_group_norm(x, scale, shift, n, c, h * w, self.groups, self.eps)
        return u, (mean, rstd)

    def again(self, x: Tensor, scale: Tensor, shift: Tensor, statistics: Statistics) -> Tensor:
        """u once more, equal to the bit."""
        return self.forward(x, scale, shift)[0]

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor, statistics: Statistics,
                 need_input: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of x, scale and shift."""
        if not _native(x):
            return _cell_backward(grad, x, scale, statistics, self.groups)
        n, c, h, w = x.shape
        return aten.native_group_norm_backward(grad, x, *statistics, scale, n, c, h * w, self.groups,
                                               [need_input, True, True])


@dataclass(frozen=True)
class BatchNorm:
    """BN: in training, statistics (chunks, C) over chunks of norm_batch images; otherwise the running ones."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float
    norm_batch: int | None = None

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Statistics]:
        if self.training and self.norm_batch is not None and self.norm_batch < len(x):
            return self._forward_chunks(x, scale, shift)
        u, mean, rstd = aten.native_batch_norm(x, scale, shift, self.running_mean, self.running_var, self.training,
                                               self.momentum, self.eps)
        return u, (mean.unsqueeze(0), rstd.unsqueeze(0))

    def _forward_chunks(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Statistics]:
        u = torch.empty_like(x)
        chunks, outs = x.split(self.norm_batch), u.split(self.norm_batch)
        mean = scale.new_empty(len(chunks), len(scale))
        rstd, variances = torch.empty_like(mean), torch.empty_like(mean)
        for i, (chunk, out) in enumerate(zip(chunks, outs)):
            # momentum 1 leaves the chunk's own mean and unbiased variance in the "running" statistics
            aten.native_batch_norm.out(chunk, scale, shift, mean[i], variances[i], True, 1.0, self.eps, out=out,
                                       save_mean=mean[i], save_invstd=rstd[i])
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variances.mean(0).to(self.running_var.dtype), self.momentum)
        return u, (mean, rstd)

    def again(self, x: Tensor, scale: Tensor, shift: Tensor, statistics: Statistics) -> Tensor:
        """u once more, from the statistics of the first time, to rounding."""
        if not self.training:
            return self.forward(x, scale, shift)[0]
        mean, rstd = statistics
        parts = [aten.native_batch_norm(chunk, scale * r, shift - m * r * scale, torch.zeros_like(m),
                                        torch.ones_like(m), False, 0.0, 0.0)[0]
                 for chunk, m, r in zip(x.split(self._chunk(x)), mean, rstd)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunk(self, x: Tensor) -> int:
        return min(self.norm_batch or len(x), len(x)) if self.training else len(x)

    def backward(self, grad: Tensor, x: Tensor, scale: Tensor, statistics: Statistics,
                 need_input: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of x, scale and shift."""
        size = self._chunk(x)
        parts = [aten.native_batch_norm_backward(g, chunk, scale, self.running_mean, self.running_var, mean, rstd,
                                                 self.training, self.eps, [need_input, True, True])
                 for g, chunk, mean, rstd in zip(grad.split(size), x.split(size), *statistics)]
        if len(parts) == 1:
            return parts[0]
        dx, dscale, dshift = zip(*parts)
        return torch.cat(dx) if need_input else None, torch.stack(dscale).sum(0), torch.stack(dshift).sum(0)


def _native(x: Tensor) -> bool:
    """Whether native_group_norm keeps memory format and precision: always on CPU; on CUDA it returns NCHW and rounds
    the statistics of half-precision maps to half precision."""
    return x.device.type == "cpu" or (x.dtype in (torch.float32, torch.float64) and x.is_contiguous())


def _cell_forward(x: Tensor, scale: Tensor, shift: Tensor, groups: int,
                  eps: float) -> tuple[Tensor, Statistics]:
    """Group norm in any memory format: u = x·A + B with A and B (N, C) in float32, in two passes over x."""
    grouped, wide = x.unflatten(1, (groups, -1)), scale.dtype
    size = grouped[0, 0].numel()
    mean = grouped.mean((2, 3, 4), dtype=wide)
    power = torch.linalg.vector_norm(grouped, dim=(2, 3, 4), dtype=wide).square() / size
    rstd = torch.rsqrt((power - mean * mean).clamp_min(0) + eps)
    a = _to_channels(rstd, x) * scale
    b = shift - _to_channels(mean, x) * a
    u = torch.addcmul(b[..., None, None], x, a[..., None, None], out=torch.empty_like(x))
    return u, (mean, rstd)


def _cell_backward(grad: Tensor, x: Tensor, scale: Tensor, statistics: Statistics,
                   groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of _cell_forward: dx = grad·A + x·D + E with A, D, E (N, C)."""
    mean, rstd = (_to_channels(s, x) for s in statistics)
    along_shift, along_scale = _cell_sums(grad, x, mean, rstd)  # sums over positions of grad and of grad·norm(x)
    size = x[0].numel() // groups
    mean_grad, mean_product = (
        _to_channels((s * scale).unflatten(1, (groups, -1)).sum(-1) / size, x) for s in (along_shift, along_scale))
    d = -rstd * rstd * mean_product
    e = -rstd * mean_grad - d * mean
    dx = torch.addcmul(e[..., None, None], x, d[..., None, None])
    dx = torch.addcmul(dx, grad, (rstd * scale)[..., None, None], out=torch.empty_like(x))
    return dx, along_scale.sum(0), along_shift.sum(0)


def _cell_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if not (x.is_contiguous() and grad.is_contiguous()):
        b = (-mean * rstd)[..., None, None]
        product = torch.addcmul(b, x, rstd[..., None, None]).mul_(grad)
        return grad.sum((2, 3), dtype=mean.dtype), product.sum((2, 3))
    # a batch norm whose channels are the N·C cells has exactly these sums as its parameters' gradients, in one pass
    flat = (1, mean.numel(), *x.shape[2:])
    m, r = mean.flatten(), rstd.flatten()
    _, product, total = aten.native_batch_norm_backward(grad.view(flat), x.view(flat), torch.ones_like(r), None, None,
                                                        m, r, True, 0.0, [False, True, True])
    return total.view_as(mean), product.view_as(mean)


def _to_channels(statistic: Tensor, x: Tensor) -> Tensor:
    """(N, groups) → (N, C)."""
    return statistic.repeat_interleave(x.shape[1] // statistic.shape[1], dim=1)
