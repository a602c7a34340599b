"""Norm, affine, activation and proxy normalization as one autograd function that keeps one map besides its output.

ReLU: s·(max(γy + β, 0) − m) = max(sγ·y + s(β − m), −s·m) with s = 1/sqrt(v + ε): one norm with affine and one
clamp against a floor per channel. Kept for backward: x and the output, which the next convolution keeps anyway.
Any other φ: gain·φ(γy + β) + offset with gain = s, offset = −s·m; kept: x, and the output for the gain's gradient. γy + β is
rebuilt in backward.

The constants per channel and their derivatives with respect to γ, β, γ̃, β̃ come from folding.py.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Union

import torch
from torch import Tensor, nn

from .kernels import BatchNorm, GroupNorm, aten, per_channel


class Constants(NamedTuple):
    """values (k, C): scale, shift of the norm and floor (ReLU), or scale, shift, gain and offset (other φ); the k − 2
    last are absent where the activation is plain. jacobian (k, 4, C): derivatives by γ, β, γ̃, β̃; None where
    scale = γ and shift = β are all there is."""

    values: Tensor
    jacobian: Tensor | None


class Head(NamedTuple):
    """What follows the norm: name of the activation ("identity" for none) and its module."""

    name: str
    module: nn.Module


class FusedStep(torch.autograd.Function):
    """z of x (N, C, H, W) and the four parameters (C,), any of which may be None; see the module's docstring.

    reference(x, weight, bias, proxy_weight, proxy_bias) is the same function in differentiable operations, without side
    effects: it serves the backward pass of the backward pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, proxy_weight: Tensor | None,
                proxy_bias: Tensor | None, norm: Union[GroupNorm, BatchNorm], head: Head, constants: Constants,
                reference: Callable[..., Tensor]) -> Tensor:
        u, statistics = norm.forward(x, constants.values[0], constants.values[1])
        z = activate(u, head, constants.values)
        ctx.norm, ctx.head, ctx.reference = norm, head, reference
        output = z if head.name == "relu" or len(constants.values) == 4 else None
        ctx.save_for_backward(x, weight, bias, proxy_weight, proxy_bias, output, *constants, *statistics)
        return z

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, bias, proxy_weight, proxy_bias, z, values, jacobian, *statistics = ctx.saved_tensors
        parameters = (weight, bias, proxy_weight, proxy_bias)
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_backward(ctx, grad, x, parameters)
        grad = grad.contiguous(memory_format=_memory_format(x))
        gradient, direct = _head_backward(grad, x, z, ctx.norm, ctx.head, values, statistics)
        scale = values[0] * values[2] if len(values) == 4 else values[0]
        dx, dscale, dshift = ctx.norm.backward(gradient, x, scale, statistics, ctx.needs_input_grad[0])
        if len(values) == 4:
            dscale, dshift = dscale * values[2], dshift * values[2]
        if ctx.head.name == "relu" and len(values) == 3:
            direct = (direct[0] - dshift,)
        by_value = [dscale, dshift, *direct]
        if jacobian is None:
            slopes = by_value
        else:
            slopes = torch.einsum("kc,kpc->pc", torch.stack(by_value), jacobian).unbind()
        return dx, *(None if p is None else d.to(p.dtype) for p, d in zip(parameters, [*slopes, None, None])), \
            None, None, None, None


def activate(u: Tensor, head: Head, values: Tensor) -> Tensor:
    """Activation and proxy normalization of u = scale·norm(x) + shift, in place."""
    if head.name == "identity":
        z = u
    elif head.name == "relu":
        if len(values) == 2:
            return u.relu_()
        return torch.clamp(u, min=per_channel(values[2]).to(u.dtype), out=u)
    else:
        z = aten.silu_(u) if head.name == "silu" else head.module(u)
    if len(values) == 4:
        z = z.mul_(per_channel(values[2]).to(z.dtype)).add_(per_channel(values[3]).to(z.dtype))
    return z
