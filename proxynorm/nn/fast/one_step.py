"""Norm, affine, φ and PN in one autograd Function, for LN, GN and IN on CPUs in float32 or float64.

It replaces the three Functions of fused.py (constants, norm, head) and saves most of their
overhead. With the norm's statistics at hand, u is rebuilt in one pass for channels_last maps, and
the norm's backward takes the gain of the gradient instead of another pass over the map.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from proxynorm.nn.fast.folding import Constants, Rule, fold_reference, pull_back
from proxynorm.nn.fast.fused import (
    Head,
    activation_backward,
    by_formula,
    channel_sum,
    differentiable,
    floored_relu_,
    floored_relu_backward,
    gained_activation,
    gained_activation_,
    gained_sums,
    per_channel,
)
from proxynorm.nn.fast.recompute import MadeOnce, Recipe

aten = torch.ops.aten


class Step(NamedTuple):
    """A layer's computation: φ, how its moments are made and used, the norm's groups and ε."""

    head: Head
    rule: Rule
    groups: int
    eps: float


class Affines(NamedTuple):
    """The norm's scale and shift, a gain (None: 1), and the offset or ReLU's floor."""

    scale: Tensor
    shift: Tensor
    gain: Tensor | None
    offset: Tensor


def takes_one_step(x: Tensor, constants: Constants) -> bool:
    """True if GroupNormAct serves x."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x.device.type == "cpu" and dense and x.dtype == constants.values.dtype


class GroupNormAct(torch.autograd.Function):
    """PN-Act of the group norm of x (N, C, H, W), from γ, β, γ̃, β̃, each (C,), and their constants.

    Backward keeps x, the norm's statistics and the output, which the next convolution keeps anyway.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        proxy_weight: Tensor,
        proxy_bias: Tensor,
        constants: Constants,
        step: Step,
        recomputing: bool,
    ) -> Tensor:
        affines = _affines(constants.values.unbind(), step)
        u, *statistics = aten.native_group_norm(
            x, *_on_norm(affines, step), *_sides(x), step.groups, step.eps
        )
        z = _apply_head_(u, affines, step)
        ctx.step = step
        ctx.u = (
            _register(x, z, affines, statistics, step)
            if recomputing and any(ctx.needs_input_grad)
            else None
        )
        ctx.save_for_backward(z, x, weight, bias, proxy_weight, proxy_bias, *statistics, *constants)
        return z

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        z, x, *parameters, mean, rstd, values, jacobian = ctx.saved_tensors
        step = ctx.step
        if by_formula(grad):
            return (
                *differentiable(partial(_reference, step), [x, *parameters], (grad,)),
                None,
                None,
                None,
            )
        affines = _affines(values.unbind(), step)
        scale, gain = affines.scale, affines.gain
        if _is_relu(step):
            sums = (channel_sum(grad),)
            du = floored_relu_backward(grad, z, affines.offset)
        else:
            sums = gained_sums(grad, z, gain, affines.offset)
            u = (
                rebuild(x, affines, [mean, rstd], step)
                if ctx.u is None
                else ctx.u.take(x, last=True)
            )
            du = activation_backward(grad, u, step.head)
        dx, dscale, dshift = aten.native_group_norm_backward(
            du,
            x,
            mean,
            rstd,
            scale if gain is None else scale * gain,
            *_sides(x),
            step.groups,
            [ctx.needs_input_grad[0], True, True],
        )
        if gain is not None:
            dscale, dshift = dscale * gain, dshift * gain
        slopes = pull_back(jacobian, (dscale, dshift, *sums))
        return (
            dx,
            *(s if s.dtype == p.dtype else s.to(p.dtype) for s, p in zip(slopes, parameters)),
            None,
            None,
            None,
        )


def _is_relu(step: Step) -> bool:
    return step.head.name == "relu"


def _affines(rows: tuple[Tensor, ...], step: Step) -> Affines:
    scale, shift, *head = rows
    if _is_relu(step):
        return Affines(scale, shift, None, head[0])
    return Affines(scale, shift, head[0] if step.rule.scale else None, head[1])


def _on_norm(affines: Affines, step: Step) -> tuple[Tensor, Tensor]:
    """Scale and shift as the norm takes them: max(u, 0) + floor = max(u + floor, floor)."""
    return affines.scale, affines.shift + affines.offset if _is_relu(step) else affines.shift


def _sides(x: Tensor) -> tuple[int, int, int]:
    """N, C, H·W of x."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _apply_head_(u: Tensor, affines: Affines, step: Step) -> Tensor:
    """The output, in place of u."""
    if _is_relu(step):
        return floored_relu_(u, affines.offset)
    return gained_activation_(u, affines.gain, affines.offset, step.head)


def rebuild(x: Tensor, affines: Affines, statistics: list[Tensor], step: Step) -> Tensor:
    """u: from its statistics, each (N, groups), where that is faster than to normalize again."""
    scale, shift = _on_norm(affines, step)
    if x.is_contiguous():
        return aten.native_group_norm(x, scale, shift, *_sides(x), step.groups, step.eps)[0]
    mean, rstd = (s.unsqueeze(2) for s in statistics)
    a = rstd * scale.view(step.groups, -1)
    b = shift.view(step.groups, -1) - mean * a
    return torch.addcmul(b.view(len(x), -1, 1, 1), x, a.view(len(x), -1, 1, 1))


def _register(
    x: Tensor, z: Tensor, affines: Affines, statistics: list[Tensor], step: Step
) -> MadeOnce | None:
    """Tell recompute.py how to rebuild z. Return how to rebuild u, where that is needed."""
    again = partial(rebuild, affines=affines, statistics=statistics, step=step)
    if _is_relu(step):
        Recipe(lambda x: floored_relu_(again(x), affines.offset), x).watch(z)
        return None
    u = MadeOnce(again)
    Recipe(
        lambda x: gained_activation(u.take(x, last=False), affines.gain, affines.offset, step.head),
        x,
    ).watch(z)
    return u


def _reference(step: Step, x: Tensor, *parameters: Tensor) -> tuple[Tensor]:
    """The output in operations that can be differentiated again."""
    scale, shift, gain, offset = _affines(fold_reference(parameters, step.rule), step)
    phi = step.head.module(F.group_norm(x, step.groups, scale, shift, step.eps))
    return ((phi if gain is None else per_channel(gain) * phi) + per_channel(offset),)
