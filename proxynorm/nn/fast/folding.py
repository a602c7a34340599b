"""Fold affine and proxy normalization into a few constants per channel, with their derivatives.

With r = 1/sqrt(v + ε): r·(φ(γy + β) − m) = gain·φ(scale·y + shift) + offset. ReLU commutes with a
positive factor, so its gain is part of scale and shift. All tensors here have C elements per row;
the channels of several layers may be concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from proxynorm.nn.activations import activation_name
from proxynorm.nn.closed_forms import silu_with_derivatives
from proxynorm.nn.fast.derivatives import by_formula, differentiable
from proxynorm.nn.moments import location_and_scale, proxy_moments


class Rule(NamedTuple):
    """How a layer computes m and v (act, method, nodes: see proxy_moments) and applies them."""

    act: nn.Module
    method: str
    nodes: int
    eps: float  # PN's ε
    scale: bool  # False: only m is subtracted, and r is 1

    @property
    def has_gain(self) -> bool:
        """False if the gain is 1: without scale, and for ReLU, whose gain is in scale and shift."""
        return self.scale and activation_name(self.act) != "relu"

    def moments(
        self, weight: Tensor, bias: Tensor, proxy_weight: Tensor, proxy_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """m and v for γ, β, γ̃, β̃, differentiable."""
        return proxy_moments(
            weight, bias, proxy_weight, proxy_bias, self.act, self.method, self.nodes
        )


class Constants(NamedTuple):
    """values (5, C), in the order of folded(), and their jacobian (5, 4, C) in γ, β, γ̃ and β̃.

    With the jacobian, a layer's backward pass is a few products of length C (pull_back) rather than
    a backward pass through the moments.
    """

    values: Tensor
    jacobian: Tensor


def folded(parameters: Sequence[Tensor], rule: Rule) -> tuple[Tensor, ...]:
    """scale, shift, gain, offset and 1/sqrt(v + ε), each (C,), as functions of γ, β, γ̃ and β̃.

    They are differentiable, in float32 (float64 for float64 parameters).
    """
    return _with_moments(rule, parameters[0], parameters[1], *rule.moments(*parameters))


def _with_moments(
    rule: Rule, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    """The rows of folded() from m and v."""
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    rescale = torch.rsqrt(var + rule.eps)
    one = torch.ones_like(rescale)
    r = rescale if rule.scale else one
    inner, gain = (one, r) if rule.has_gain else (r, one)
    return inner * weight, inner * bias, gain, -r * mean, rescale


def evaluate_constants(parameters: Sequence[Tensor], rule: Rule) -> Constants:
    """The rows of folded() and their derivatives, detached from autograd."""
    # These graphs are used up here: saved-tensor hooks, such as checkpointing's, must not see them.
    identity = saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.enable_grad(), identity:
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        leaves = [p.detach().to(dtype, copy=True).requires_grad_() for p in parameters]
        moments, derivatives = _moments_with_derivatives(rule, leaves)
    with torch.inference_mode(False), torch.no_grad():
        values = torch.stack(_with_moments(rule, leaves[0], leaves[1], *moments))
        return Constants(
            values, _derivatives_of_rows(rule, leaves[0], leaves[1], moments, derivatives)
        )


def _derivatives_of_rows(
    rule: Rule, weight: Tensor, bias: Tensor, moments: Tensor, derivatives: Tensor
) -> Tensor:
    """The derivatives of _with_moments' rows in γ, β, γ̃ and β̃, (5, 4, C), from those of m and v.

    They are written by hand, because autograd would take as long as the moments on a CPU.
    """
    (mean, var), (by_mean, by_var) = moments, derivatives
    rescale = torch.rsqrt(var + rule.eps)
    by_rescale = -0.5 * rescale**3 * by_var
    zero, one = torch.zeros_like(by_rescale), torch.ones_like(rescale)
    r, by_r = (rescale, by_rescale) if rule.scale else (one, zero)
    inner, by_inner, by_gain = (one, zero, by_r) if rule.has_gain else (r, by_r, zero)
    by_scale, by_shift = weight * by_inner, bias * by_inner
    by_scale[0] += inner
    by_shift[1] += inner
    by_offset = -mean * by_r - r * by_mean
    return torch.stack([by_scale, by_shift, by_gain, by_offset, by_rescale])


def _moments_with_derivatives(rule: Rule, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """m and v, (2, C), and their derivatives in the leaves, (2, 4, C), both detached."""
    if activation_name(rule.act) == "silu" and rule.method != "grid":
        # With autograd, folding would take a tenth of an EfficientNet's step on a CPU.
        weight, bias, proxy_weight, proxy_bias = (p.detach() for p in leaves)
        a, s = location_and_scale(weight, bias, proxy_weight, proxy_bias)
        moments, (by_a, by_s) = silu_with_derivatives(a, s)
        spread = 1 + proxy_weight
        by_s = by_s * (weight * spread).sign()  # s = |γ(1 + γ̃)|
        derivatives = [by_a * proxy_bias + by_s * spread, by_a, by_s * weight, by_a * weight]
        return moments.to(weight.dtype), torch.stack(derivatives, dim=1).to(weight.dtype)
    moments = torch.stack(rule.moments(*leaves))
    # One batched backward pass for both. Channels are independent: a row of ones seeds them all.
    seeds = torch.eye(2, dtype=moments.dtype, device=moments.device)[..., None]
    by_leaves = torch.autograd.grad(
        moments, leaves, seeds.expand(2, *moments.shape), is_grads_batched=True
    )
    return moments.detach(), torch.stack(by_leaves, dim=1)


def pull_back(
    jacobian: Tensor, grads: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of γ, β, γ̃ and β̃ from those of the rows; None means zero."""
    total: Tensor | None = None
    for row, grad in zip(jacobian, grads):
        if grad is not None:
            total = row * grad if total is None else total.addcmul_(row, grad)
    if total is None:
        return [None] * len(parameters)
    return [by_p.to(p.dtype) for by_p, p in zip(total, parameters)]


class Rescale(torch.autograd.Function):
    """1/sqrt(v + ε), the last row of folded(), from constants that were already evaluated."""

    @staticmethod
    def forward(ctx: Any, constants: Constants, rule: Rule, *parameters: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(constants.jacobian, *parameters)
        return constants.values[-1].clone()  # a copy, because later calls use the constants

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, *parameters = ctx.saved_tensors
        if by_formula(grad):
            by_parameters = differentiable(lambda *p: folded(p, ctx.rule)[-1], parameters, grad)
        else:
            by_parameters = pull_back(jacobian[-1:], (grad,), parameters)
        return None, None, *by_parameters
