"""Folds affine and proxy normalization into a few constants per channel, with their derivatives.

With r = 1/sqrt(v + ε): r·(φ(γy + β) − m) = gain·φ(scale·y + shift) + offset. As ReLU commutes with
a positive factor, its gain goes into scale and shift. Everything here is (C,)-sized; the channels
of many layers may stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from proxynorm.nn.activations import activation_name
from proxynorm.nn.closed_forms import silu_with_slopes
from proxynorm.nn.fast.derivatives import by_formula, differentiable
from proxynorm.nn.moments import location_and_scale, proxy_moments


class Rule(NamedTuple):
    """How m and v are computed and used. scale False: only m is subtracted, as if r were 1."""

    act: nn.Module
    method: str
    nodes: int
    eps: float
    scale: bool

    @property
    def has_gain(self) -> bool:
        """False if the gain is 1: without scale, and for ReLU, whose gain goes into the norm's."""
        return self.scale and activation_name(self.act) != "relu"

    def moments(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """m and v for γ, β, γ̃, β̃, differentiable."""
        weight, bias, proxy_weight, proxy_bias = parameters
        return proxy_moments(
            weight, bias, proxy_weight, proxy_bias, self.act, self.method, self.nodes
        )


class Constants(NamedTuple):
    """values (5, C): see folded. jacobian (5, 4, C): their derivatives by γ, β, γ̃, β̃."""

    values: Tensor
    jacobian: Tensor


def folded(parameters: Sequence[Tensor], rule: Rule) -> tuple[Tensor, ...]:
    """scale, shift, gain, offset and 1/sqrt(v + ε) for γ, β, γ̃, β̃, each (C,), differentiable.

    They are float32 (float64 for float64 parameters).
    """
    return _with_moments(rule, parameters[0], parameters[1], *rule.moments(parameters))


def _with_moments(
    rule: Rule, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    rescale = torch.rsqrt(var + rule.eps)
    one = torch.ones_like(rescale)
    r = rescale if rule.scale else one
    inner, gain = (one, r) if rule.has_gain else (r, one)
    return inner * weight, inner * bias, gain, -r * mean, rescale


def fold(parameters: Sequence[Tensor], rule: Rule) -> Constants:
    """The rows of folded() and their derivatives, outside of autograd."""
    # These graphs end here: saved-tensor hooks, such as checkpointing's, must not see them.
    identity = saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.enable_grad(), identity:
        wide = torch.promote_types(parameters[0].dtype, torch.float32)
        leaves = [p.detach().to(wide, copy=True).requires_grad_() for p in parameters]
        moments, slopes = _moments_with_slopes(rule, leaves)
        mean, var = moments.unbind()
        inner = [*leaves[:2], mean.requires_grad_(), var.requires_grad_()]
        values = torch.stack(_with_moments(rule, *inner))
        by_inner = _jacobian(values, inner)
        jacobian = (by_inner[:, 2:, None] * slopes).sum(1)  # through m and v
        jacobian[:, :2] += by_inner[:, :2]
    return Constants(values.detach(), jacobian)


def _moments_with_slopes(rule: Rule, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """m and v (2, C) and their derivatives by the leaves (2, 4, C), both detached."""
    if activation_name(rule.act) == "silu" and rule.method != "grid":
        # an EfficientNet's folding would take a tenth of its step on a CPU by autograd
        location = torch.stack(location_and_scale(*leaves))
        moments, by_location = silu_with_slopes(*location.detach())
        wide, by_leaves = leaves[0].dtype, _jacobian(location, leaves)
        return moments.to(wide), (by_location.to(wide)[:, :, None] * by_leaves).sum(1)
    moments = torch.stack(rule.moments(leaves))
    return moments.detach(), _jacobian(moments, leaves)


def _jacobian(rows: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The derivatives of rows (k, C) by n inputs, channel by channel: (k, n, C)."""
    seeds = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    slopes = torch.autograd.grad(
        rows, inputs, seeds[..., None].expand(-1, *rows.shape), is_grads_batched=True
    )
    return torch.stack(slopes, dim=1)


def pull_back(jacobian: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of γ, β, γ̃, β̃ from those of the rows; None is zero."""
    total = None
    for slopes, grad in zip(jacobian, grads):
        if grad is not None:
            total = slopes * grad if total is None else total.addcmul_(slopes, grad)
    return (None,) * 4 if total is None else total.unbind()


class FoldedConstants(torch.autograd.Function):
    """The rows of folded() from constants evaluated before, as a function of γ, β, γ̃, β̃."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        proxy_weight: Tensor,
        proxy_bias: Tensor,
        constants: Constants,
        rule: Rule,
    ) -> tuple[Tensor, ...]:
        ctx.rule = rule
        ctx.set_materialize_grads(False)  # a squeeze-excite gate asks for the last row alone
        ctx.save_for_backward(weight, bias, proxy_weight, proxy_bias, constants.jacobian)
        return constants.values.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *parameters, jacobian = ctx.saved_tensors
        slopes: Sequence[Tensor | None]
        if any(grad is not None and by_formula(grad) for grad in grads):
            slopes = differentiable(lambda *p: folded(p, ctx.rule), parameters, grads)
        else:
            slopes = pull_back(jacobian, grads)
        cast = (s if s is None else s.to(p.dtype) for s, p in zip(slopes, parameters))
        return *cast, None, None
