"""NormAct2d: a norm without affine, followed by Act or PN-Act."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .activations import Activation, activation_name, make_activation
from .moments import METHODS, proxy_moments
from .names import KINDS, NORMS, norm_spec, unknown_name
from .norms import NormBatch, batch_normalize, group_normalize


def default_groups(num_features: int, most: int = 32) -> int:
    """GN's number of groups where none is given: the largest divisor of num_features that is at most 32."""
    return max(g for g in range(1, min(most, num_features) + 1) if num_features % g == 0)


class NormAct2d(nn.Module):
    """Norm, then Act(y) = φ(γy + β) or PN-Act(y) = (φ(γy + β) − m) / sqrt(v + proxy_eps); a timm norm_act layer.

    m and v are the moments of φ(γY + β), Y ~ N(β̃, (1 + γ̃)²). Input and output have shape (N, C, H, W).
    """

    def __init__(self, num_features: int, norm: str = "ln", proxy: bool = True, act_layer: Activation = "relu",
                 apply_act: bool = True, groups: int | None = None, eps: float = 1e-5, proxy_eps: float = 0.03,
                 norm_batch: NormBatch = None, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, inplace: bool = False, act_kwargs: dict | None = None,
                 drop_layer: Callable[[], nn.Module] | None = None, proxy_scale: bool = True, moments: str = "auto",
                 nodes: int = 256, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if norm not in KINDS and norm not in NORMS:
            raise ValueError(unknown_name("norm", norm, NORMS))
        if "_" in norm:
            proxy = norm_spec(norm).proxy
        self.num_features, self.eps, self.proxy_eps, self.momentum = num_features, eps, proxy_eps, momentum
        self.kind = norm.split("_")[0]
        self.apply_act = apply_act and act_layer is not None
        self.proxy = bool(proxy) and self.kind != "none"
        if moments not in METHODS:
            raise ValueError(unknown_name("moments", moments, METHODS))
        self.norm_batch, self.proxy_scale, self.moments, self.nodes = norm_batch, proxy_scale, moments, nodes
        self.groups = self._number_of_groups(groups)
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        self.act = make_activation(act_layer if self.apply_act else None, inplace, **(act_kwargs or {}))
        self.act_name = activation_name(self.act)
        self._make_parameters(affine, {"device": device, "dtype": dtype})
        self._make_buffers(track_running_stats, device)
        self.reset_parameters()

    def _number_of_groups(self, groups: int | None) -> int | None:
        if self.kind in ("bn", "none"):
            return None
        chosen = {"ln": 1, "in": self.num_features}.get(self.kind) or groups or default_groups(self.num_features)
        if self.num_features % chosen:
            raise ValueError(f"groups={chosen} does not divide num_features={self.num_features}")
        return chosen

    def _make_parameters(self, affine: bool, factory: dict) -> None:
        proxied = self.proxy and self.apply_act
        present = {"weight": affine, "bias": affine and (proxied or not self.proxy),
                   "proxy_weight": proxied, "proxy_bias": proxied}
        for name, wanted in present.items():
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_features, **factory)) if wanted else None)

    def _make_buffers(self, track_running_stats: bool, device: torch.device | str | None) -> None:
        if self.kind != "bn":
            return
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.zeros(self.num_features, device=device) if tracked else None)
        self.register_buffer("running_var", torch.ones(self.num_features, device=device) if tracked else None)
        self.register_buffer("num_batches_tracked",
                             torch.tensor(0, dtype=torch.long, device=device) if tracked else None)

    def reset_parameters(self) -> None:
        """γ = 1; β, γ̃ (the deviation from 1) and β̃ = 0; running mean 0 and variance 1."""
        for name, value in (("weight", 1.0), ("bias", 0.0), ("proxy_weight", 0.0), ("proxy_bias", 0.0)):
            parameter = getattr(self, name)
            if parameter is not None:
                nn.init.constant_(parameter, value)
        if self.kind == "bn" and self.running_mean is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def proxy_statistics(self) -> tuple[Tensor, Tensor]:
        """m and v, shape (C,), of this layer's activation; functions of the four parameters alone."""
        if not (self.proxy and self.apply_act):
            raise ValueError("this layer has no proxy normalization, hence no proxy statistics")
        weight = self.weight if self.weight is not None else torch.ones_like(self.proxy_weight)
        bias = self.bias if self.bias is not None else torch.zeros_like(self.proxy_weight)
        return proxy_moments(weight, bias, self.proxy_weight, self.proxy_bias, self.act, self.moments, self.nodes)

    def proxy_rescale(self) -> Tensor:
        """1 / sqrt(v + proxy_eps), shape (C,): what a layer with proxy_scale=False leaves to a later gate."""
        return torch.rsqrt(self.proxy_statistics()[1] + self.proxy_eps)

    def normalize(self, x: Tensor) -> Tensor:
        """y, the norm of x before γ and β; same shape, dtype and, where the norm keeps it, memory format."""
        if self.kind == "none":
            return x
        if self.kind != "bn":
            return group_normalize(x, self.groups, self.eps)
        momentum = self.momentum
        if self.training and self.running_mean is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        training = self.training or self.running_mean is None
        return batch_normalize(x, self.running_mean, self.running_var, training, momentum or 0.0, self.eps,
                               self.norm_batch)

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalize(x)
        shape = (1, -1, 1, 1)
        with torch.autocast(x.device.type, enabled=False):
            u = y if self.weight is None else y * self.weight.view(shape)
            u = u if self.bias is None else u + self.bias.view(shape)
            z = self.act(self.drop(u))
            if self.proxy and self.apply_act:
                mean, var = self.proxy_statistics()
                z = z - mean.view(shape)
                if self.proxy_scale:
                    z = z * torch.rsqrt(var + self.proxy_eps).view(shape)
            return z.to(x.dtype)

    def extra_repr(self) -> str:
        parts = [str(self.num_features), f"norm={self.kind}", f"proxy={self.proxy}"]
        parts += [f"groups={self.groups}"] if self.kind == "gn" else []
        parts += [f"norm_batch={self.norm_batch}"] if self.norm_batch is not None else []
        parts += [f"eps={self.eps}", f"apply_act={self.apply_act}"]
        return ", ".join(parts)
