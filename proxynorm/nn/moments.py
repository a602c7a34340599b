"""Mean and variance of an activation φ(γY + β) of a Gaussian proxy Y ~ N(β̃, (1 + γ̃)²), per channel."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .activations import Activation, activation_name, make_activation

METHODS = ("auto", "exact", "grid")


def proxy_moments(weight: Tensor, bias: Tensor, proxy_weight: Tensor, proxy_bias: Tensor,
                  activation: Activation = "relu", method: str = "auto", nodes: int = 256) -> tuple[Tensor, Tensor]:
    """Mean and variance of φ(γY + β) with Y ~ N(β̃, (1 + γ̃)²).

    weight γ, bias β, proxy_weight γ̃ and proxy_bias β̃ have shape (C,); so have the two results, in float32 (float64 for
    float64 parameters) whatever autocast says. Twice differentiable in all four.
    """
    module = make_activation(activation)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} of proxy_moments. Choose one of: {', '.join(METHODS)}")
    with torch.autocast(weight.device.type, enabled=False):
        if method == "grid":
            return grid_moments(module, weight, bias, proxy_weight, proxy_bias, nodes)
        return exact_moments(module, weight, bias, proxy_weight, proxy_bias)


def grid_moments(module: nn.Module, weight: Tensor, bias: Tensor, proxy_weight: Tensor, proxy_bias: Tensor,
                 nodes: int = 256) -> tuple[Tensor, Tensor]:
    """The paper's integration: uniform weights on Gaussian mid-point quantiles √2·erfinv(2(k+½)/n − 1)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, bias, proxy_weight, proxy_bias = (
        p.to(dtype).unsqueeze(-1) for p in (weight, bias, proxy_weight, proxy_bias))
    middle = (torch.arange(nodes, dtype=torch.float64, device="cpu") + 0.5) / nodes
    grid = (math.sqrt(2) * torch.erfinv(2 * middle - 1)).to(weight.device, dtype)
    z = module(weight * (proxy_bias + (1 + proxy_weight) * grid) + bias)
    mean = z.mean(-1)
    return mean, (z - mean.unsqueeze(-1)).square().mean(-1)


def exact_moments(module: nn.Module, weight: Tensor, bias: Tensor, proxy_weight: Tensor,
                  proxy_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Closed form or quadrature: γY + β is N(a, s²) with a = γβ̃ + β and s = |γ(1 + γ̃)|."""
    out = torch.promote_types(weight.dtype, torch.float32)
    work = torch.float32 if weight.device.type == "mps" else torch.float64
    weight, bias, proxy_weight, proxy_bias = (p.to(work) for p in (weight, bias, proxy_weight, proxy_bias))
    a, s = weight * proxy_bias + bias, (weight * (1 + proxy_weight)).abs()
    name = activation_name(module)
    if name in ("relu", "leaky_relu", "identity"):
        slope = {"relu": 0.0, "identity": 1.0}.get(name, getattr(module, "negative_slope", 0.0))
        mean, var = _two_slopes(a, s, slope)
    else:
        mean, var = _quadrature(module, a, s)
    return mean.to(out), var.to(out)


def _two_slopes(a: Tensor, s: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    s = s.clamp_min(1e-30)
    t = (a / s).clamp(-40, 40)  # beyond, Φ and the density are 0 or 1 in float64 and only make NaN derivatives
    cdf, density = torch.special.ndtr(t), torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    first, second = a * cdf + s * density, (a * a + s * s) * cdf + a * s * density
    mean = (1 - slope) * first + slope * a
    square = (1 - slope * slope) * second + slope * slope * (a * a + s * s)
    return mean, (square - mean * mean).clamp_min(0)


def _quadrature(module: Callable[[Tensor], Tensor], a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    nodes = torch.linspace(-6.5, 6.5, 161, dtype=a.dtype, device=a.device)
    weights = torch.exp(-nodes * nodes / 2)
    weights = weights / weights.sum()
    z = module(a.unsqueeze(-1) + s.unsqueeze(-1) * nodes)
    mean = (z * weights).sum(-1)
    return mean, ((z - mean.unsqueeze(-1)).square() * weights).sum(-1)
