"""Folds affine and proxy normalization into a few constants per channel, with their derivatives.

Everything here is (C,)-sized, without autograd; the channels of many layers may stand side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxynorm.nn.activations import activation_name
from proxynorm.nn.closed_forms import Moments
from proxynorm.nn.moments import location_and_scale, moments_with_slopes, proxy_moments


class Rule(NamedTuple):
    """How m and v are computed and used.

    scale False: only m is subtracted, and 1/sqrt(v + ε) is one more row of constants.
    """

    module: nn.Module
    method: str
    nodes: int
    eps: float
    scale: bool


class Constants(NamedTuple):
    """values (k, C): see fold. jacobian (k, 4, C): their derivatives by γ, β, γ̃, β̃."""

    values: Tensor
    jacobian: Tensor


class SharedConstants(NamedTuple):
    """A layer's constants, with the rule and the parameter versions that they were made from."""

    constants: Constants
    rule: Rule
    versions: list[tuple[int, int]]


@torch.no_grad()
def fold(parameters: tuple[Tensor, Tensor, Tensor, Tensor], rule: Rule) -> Constants:
    """The constants for γ, β, γ̃, β̃, each (C,), in float32 (float64 for float64 parameters).

    With r = 1/sqrt(v + ε), the rows are rγ, rβ and the floor −rm for ReLU; γ, β, the gain r and the
    offset −rm for others. Without the rule's scale, the same for r = 1, and 1/sqrt(v + ε) last.
    """
    out = torch.promote_types(parameters[0].dtype, torch.float32)
    a, s, sign = location_and_scale(*parameters)
    moments = moments_with_slopes(rule.module, a, s, rule.method, rule.nodes)
    moments = Moments(*(m.to(out) for m in moments))
    rescale = _rescale(moments, rule.eps)
    r = rescale if rule.scale else F.pad(torch.ones_like(rescale[:1]), (0, 0, 0, 2))
    offset = -r[0] * torch.stack([moments.mean, moments.mean_a, moments.mean_s])
    offset[1:] -= r[1:] * moments.mean
    weight, bias, proxy_weight, proxy_bias = (p.to(out) for p in parameters)
    if activation_name(rule.module) == "relu":
        columns = torch.stack([r * weight, r * bias, offset], dim=1)
        direct = r[0]
    else:
        columns = F.pad(torch.stack([r, offset], dim=1), (0, 0, 2, 0))
        columns[0, 0], columns[0, 1] = weight, bias
        direct = 1.0
    if not rule.scale:
        columns = torch.cat([columns, rescale.unsqueeze(1)], dim=1)
    values, by_a, by_s = columns  # each (k, C)
    by_s = by_s * sign.to(out)
    jacobian = torch.stack(
        [by_a * proxy_bias + by_s * (1 + proxy_weight), by_a, by_s * weight, by_a * weight], dim=1
    )
    jacobian[0, 0] += direct  # the first by γ and the second by β, at fixed moments
    jacobian[1, 1] += direct
    return Constants(values, jacobian)


def pull_back(jacobian: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of γ, β, γ̃, β̃ from those of the first rows of values; None is zero."""
    total = None
    for slopes, grad in zip(jacobian, grads):
        if grad is not None:
            total = slopes * grad if total is None else total.addcmul_(slopes, grad)
    return (None,) * 4 if total is None else total.unbind()


def fold_reference(
    parameters: tuple[Tensor, Tensor, Tensor, Tensor], rule: Rule
) -> tuple[Tensor, ...]:
    """The rows of fold(parameters, rule).values in differentiable operations."""
    weight, bias, *_ = parameters
    mean, var = proxy_moments(*parameters, rule.module, rule.method, rule.nodes)
    rescale = torch.rsqrt(var + rule.eps)
    r = rescale if rule.scale else torch.ones_like(var)
    last = () if rule.scale else (rescale,)
    if activation_name(rule.module) == "relu":
        return r * weight, r * bias, -r * mean, *last
    return weight.to(r.dtype), bias.to(r.dtype), r, -r * mean, *last


def _rescale(moments: Moments, eps: float) -> Tensor:
    """1/sqrt(v + ε), its derivative by a, its derivative by s: (3, C)."""
    value = torch.rsqrt(moments.var + eps)
    slope = -0.5 * value * value * value
    return torch.stack([value, slope * moments.var_a, slope * moments.var_s])
