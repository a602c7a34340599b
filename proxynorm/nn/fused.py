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

from .folding import Constants
from .kernels import BatchNorm, GroupNorm, aten, per_channel


def is_transformed() -> bool:
    """Whether something looks into the operations: torch.compile, export, tracing, torch.func, forward-mode AD."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0)


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


def _head_backward(grad: Tensor, x: Tensor, z: Tensor | None, norm: Union[GroupNorm, BatchNorm], head: Head,
                   values: Tensor, statistics: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradient of u (without the factor gain) and the sums that the constants' gradients need beside the norm's."""
    if head.name == "relu" and len(values) == 2:
        return aten.threshold_backward(grad, z, 0), ()
    if head.name == "relu":
        above = z - per_channel(values[2]).to(z.dtype)  # 0 exactly where the floor cut
        return aten.threshold_backward.grad_input(grad, above, 0, grad_input=above), (channel_sum(grad),)
    direct = _gain_gradients(grad, z, values) if len(values) == 4 else ()
    if head.name == "identity":
        return grad, direct
    u = norm.again(x, values[0], values[1], tuple(statistics))
    return _activation_backward(grad, u, head), direct


def _gain_gradients(grad: Tensor, z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a channel of grad·φ and of grad, in one pass: those of a batch norm's weight and bias, since
    φ = (z − offset) / gain."""
    gain, offset = values[2], values[3]
    _, product, total = aten.native_batch_norm_backward(grad, z, torch.ones_like(gain), None, None, offset,
                                                        gain.reciprocal(), True, 0.0, [False, True, True])
    return product, total


def channel_sum(grad: Tensor) -> Tensor:
    """Sum over samples and positions, (C,), in float32 or better."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum((0, 2, 3), dtype=wide)


def _activation_backward(grad: Tensor, u: Tensor, head: Head) -> Tensor:
    """grad·φ'(u); u's memory is reused."""
    if head.name == "silu":
        return aten.silu_backward.grad_input(grad, u, grad_input=u)
    if head.name in ("gelu", "gelu_tanh"):
        approximate = "tanh" if head.name == "gelu_tanh" else "none"
        return aten.gelu_backward.grad_input(grad, u, approximate=approximate, grad_input=u)
    with torch.enable_grad():
        u.requires_grad_()
        return torch.autograd.grad(head.module(u), u, grad)[0]


def _differentiable_backward(ctx, grad: Tensor, x: Tensor, parameters: tuple[Tensor | None, ...]) -> tuple:
    inputs = (x, *parameters)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    z = ctx.reference(*inputs)
    slopes = iter(torch.autograd.grad(z, wanted, grad, create_graph=True, allow_unused=True))
    return *(next(slopes) if t is not None and t.requires_grad else None for t in inputs), None, None, None, None


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last
