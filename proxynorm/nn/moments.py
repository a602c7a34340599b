"""Mean and variance of φ(γY + β) for a Gaussian proxy Y ~ N(β̃, (1 + γ̃)²), per channel.

γY + β is N(a, s²) with a = γβ̃ + β and s = |γ(1 + γ̃)|, so both moments depend on a and s alone.

Maximum errors of "exact" and of the paper's grid of 256 nodes over γ in 0.01 … 10, β in ±5,
γ̃ = β̃ = 0 (tests/nn/test_moments.py checks them against high-precision integration):

    activation                                       mean     var
    relu, leaky_relu, gelu, identity                 1e-12    1e-11    closed forms
    relu6, hard_tanh, hard_sigmoid, hard_swish,
    elu, celu, selu                                  1e-12    1e-11    quadrature, split at kinks
    silu, sigmoid, tanh                              2e-8     5e-7     mixture of normals
    mish, gelu_tanh, softplus                        5e-8     1e-6     quadrature
    grid: relu, silu, gelu, identity …               4e-3     5e-1     at γ = 10; ∝ γ and γ²

Any other callable is integrated with a step of 0.08·s. If it is smooth on that scale, the errors
are as small as mish's (Softplus(beta=3): 7e-6, 9e-5). A kink where the slope jumps by Δ adds errors
of up to 2.2e-4·sΔ in the mean, 3.6e-4·s²ΔL in the variance (L is the maximum slope) and 1.7e-2·Δ in
the mean's derivative in β. A jump of height J in the function itself (nn.Threshold, nn.Hardshrink)
adds up to 1.7e-2·J in the mean, and gradients do not include it.

Results are rounded to float32 for float32 parameters. "auto" is "exact".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxynorm.nn import closed_forms
from proxynorm.nn.activations import Activation, activate, activation_name, make_activation
from proxynorm.nn.checks import check_whole, unknown_name
from proxynorm.nn.fast.precision import without_autocast

METHODS = ("auto", "exact", "grid")


def proxy_moments(
    weight: Tensor,
    bias: Tensor,
    proxy_weight: Tensor,
    proxy_bias: Tensor,
    activation: Activation = "relu",
    method: str = "auto",
    nodes: int = 256,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of φ(γY + β) with Y ~ N(β̃, (1 + γ̃)²).

    weight γ, bias β, proxy_weight γ̃ and proxy_bias β̃ have shape (C,).

    Returns: mean and variance, shape (C,), in float32 (float64 for float64 parameters), also under
    autocast. They are twice differentiable in all four parameters if torch's activation is.

    Raises ValueError for an unknown method.
    """
    module = make_activation(activation)
    check_method(method, nodes)
    with without_autocast(weight.device):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if method == "grid":
            weight, bias, proxy_weight, proxy_bias = (
                p.to(dtype) for p in (weight, bias, proxy_weight, proxy_bias)
            )
            y = proxy_bias + (1 + proxy_weight) * grid_nodes(nodes, weight)[:, None]
            z = _activate(module, weight * y + bias)
            mean = z.mean(0)
            return mean, (z - mean).square().mean(0)
        mean, var = _exact(module, *location_and_scale(weight, bias, proxy_weight, proxy_bias))
        return mean.to(dtype), var.to(dtype)


def location_and_scale(
    weight: Tensor, bias: Tensor, proxy_weight: Tensor, proxy_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """a = γβ̃ + β and s = |γ(1 + γ̃)|, in the working precision."""
    work = working_dtype(weight)
    weight, bias, proxy_weight, proxy_bias = (
        p.to(work) for p in (weight, bias, proxy_weight, proxy_bias)
    )
    return weight * proxy_bias + bias, (weight * (1 + proxy_weight)).abs()


def check_method(method: str, nodes: int) -> None:
    """Raise ValueError for an unknown method or a number of nodes below 1."""
    if method not in METHODS:
        raise ValueError(unknown_name("method of moments", method, METHODS))
    check_whole("nodes", nodes, 1)


def working_dtype(like: Tensor) -> torch.dtype:
    """float64, where the cancellation in E[φ²] − m² is harmless; float32 on devices without it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


_CLOSED: dict[str, Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]] = {
    "relu": lambda a, s, module: closed_forms.leaky_relu(a, s, 0.0),
    "leaky_relu": lambda a, s, module: closed_forms.leaky_relu(a, s, module.negative_slope),
    "identity": lambda a, s, module: closed_forms.leaky_relu(a, s, 1.0),
    "silu": lambda a, s, module: closed_forms.silu(a, s),
    "gelu": lambda a, s, module: closed_forms.gelu(a, s),
    "sigmoid": lambda a, s, module: closed_forms.sigmoid(a, s),
    "tanh": lambda a, s, module: closed_forms.tanh(a, s),
}
# φ, and where its slope jumps. A piece also ends at -40, where exp(u) is 0: the quadrature would
# not resolve a longer one.
_KINKED: dict[str, Callable[[Any], tuple[Callable[[Tensor], Tensor], tuple[float, float]]]] = {
    "relu6": lambda module: (F.relu6, (0.0, 6.0)),
    "hard_tanh": lambda module: (module, (module.min_val, module.max_val)),
    "hard_sigmoid": lambda module: (F.hardsigmoid, (-3.0, 3.0)),
    "hard_swish": lambda module: (F.hardswish, (-3.0, 3.0)),
    "elu": lambda module: (module, (-40.0, 0.0)),
    "celu": lambda module: (module, (-40.0 * module.alpha, 0.0)),
    "selu": lambda module: (F.selu, (-40.0, 0.0)),
}


def _exact(module: nn.Module, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance in closed form, by quadrature between kinks, or else by a fixed rule."""
    name = activation_name(module)
    if name in _CLOSED:
        return _CLOSED[name](a, s, module)
    if name in _KINKED:
        phi, kinks = _KINKED[name](module)
        return closed_forms.between_kinks(phi, a, s, kinks)
    # the trapezoidal rule with 161 nodes on ±6.5 standard deviations
    nodes = torch.linspace(-6.5, 6.5, 161, dtype=a.dtype, device=a.device)
    weights = torch.exp(-0.5 * nodes * nodes)
    weights = weights / weights.sum()
    z = _activate(module, a + s * nodes[:, None])
    mean = weights @ z
    return mean, weights @ (z - mean).square()


def _activate(module: nn.Module, u: Tensor) -> Tensor:
    """φ(u) for u (nodes, C). As a map, u has the channels where the parameters of φ expect them."""
    return activate(module, u[:, :, None, None])[:, :, 0, 0]


def grid_nodes(nodes: int, like: Tensor) -> Tensor:
    """The Gaussian mid-point quantiles √2·erfinv(2(k + ½)/n − 1), computed in float64."""
    middle = torch.arange(nodes, dtype=working_dtype(like), device=like.device)
    middle = (middle + 0.5) / nodes
    return (math.sqrt(2) * torch.erfinv(2 * middle - 1)).to(like)
