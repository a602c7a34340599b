"""gain·φ(norm(x)·scale + shift) + offset in one autograd Function: PN-Act after folding.py.

The output overwrites u = norm(x)·scale + shift. Backward keeps the norm's input and, where it needs
it, the output, which the next convolution keeps anyway; where it needs u, it makes u again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from proxynorm.nn.activations import activation_name
from proxynorm.nn.fast.derivatives import by_formula, differentiable
from proxynorm.nn.fast.folding import Constants, Rule, folded, pull_back
from proxynorm.nn.fast.kernels import Kernel, aten
from proxynorm.nn.fast.recompute import Remade, is_recomputing


class NormAct(torch.autograd.Function):
    """z = gain·φ(u) + offset with u = norm(x)·scale + shift; the constants are (C,).

    With a rule, parameters are γ, β, γ̃, β̃ and the constants are folded from them already; without,
    they are scale and shift, gain is 1 and offset 0. act must leave its input alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Kernel,
        act: nn.Module,
        constants: Constants | None,
        rule: Rule | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.norm, ctx.act, ctx.rule = norm, act, rule
        values, jacobian = (None, None) if constants is None else constants
        scale, shift, gain, offset = _rows(rule, values, parameters)
        floor = _floor(x, gain, offset, act)
        ctx.floored, ctx.remade = floor is not None, None
        on_norm = shift if floor is None else shift + floor
        u, *statistics = norm.forward(x, scale, on_norm)
        z = _head_(u, floor, gain, offset, act)
        if is_recomputing() and any(ctx.needs_input_grad):
            kept: list[Any] = [scale, on_norm, floor, gain, offset]
            kept = [t if t is None else t.detach() for t in kept]

            def make(x: Tensor) -> Tensor:
                u = norm.again(x, kept[0], kept[1], *statistics)
                return _head_(u, kept[2], kept[3], kept[4], act)

            ctx.remade = Remade(make)
            ctx.remade.replaces(z, x)
        keeps_output = ctx.remade is None and (ctx.floored or gain is not None)
        output, ctx.count = z if keeps_output else None, len(parameters)
        ctx.save_for_backward(x, output, values, jacobian, *parameters, *statistics)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, values, jacobian, *rest = ctx.saved_tensors
        parameters, statistics = rest[: ctx.count], rest[ctx.count :]
        if by_formula(grad):
            reference = partial(_reference, ctx.norm, ctx.act, ctx.rule, statistics)
            dx, *slopes = differentiable(reference, (x, *parameters), (grad,))
            return dx, None, None, None, None, *slopes
        if ctx.remade is not None:
            z = ctx.remade.take(x, last=True)
        scale, shift, gain, offset = _rows(ctx.rule, values, parameters)
        by_gain, by_offset = _head_sums(grad, z, gain, offset)
        if ctx.floored and offset is not None:
            above = z - per_channel(offset)  # 0 exactly where the floor cut
            du = aten.threshold_backward.grad_input(grad, above, 0, grad_input=above)
        else:
            u = ctx.norm.again(x, scale, shift, *statistics)
            du = _act_backward(grad, u, ctx.act)
        # the gain reaches x, scale and shift through the constants, not by a pass over the map
        gained = scale if gain is None else scale * gain
        dx, *slopes = ctx.norm.backward(du, x, gained, *statistics, ctx.needs_input_grad[0])
        if gain is not None:
            slopes = [slope * gain for slope in slopes]
        if jacobian is not None:
            slopes = pull_back(jacobian, (*slopes, by_gain, by_offset), parameters)
        return dx, None, None, None, None, *slopes


def _rows(
    rule: Rule | None, values: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """scale, shift, gain and offset; a gain of 1 and an offset of 0 are None.

    Either would cost a pass over the map.
    """
    if rule is None or values is None:
        return parameters[0], parameters[1], None, None
    scale, shift, gain, offset, _ = values.unbind()
    return scale, shift, gain if rule.has_gain else None, offset


def _floor(x: Tensor, gain: Tensor | None, offset: Tensor | None, act: nn.Module) -> Tensor | None:
    """The offset, if z = max(u + offset, offset): in z, backward finds where u was below 0.

    The norm adds the offset. Half precision rounds values just above it onto it, which backward
    would miss; there u is made again, near 0 and exact.
    """
    is_relu = gain is None and activation_name(act) == "relu"
    return offset if is_relu and offset is not None and x.dtype == offset.dtype else None


def _reference(
    norm: Kernel,
    act: nn.Module,
    rule: Rule | None,
    statistics: list[Tensor],
    x: Tensor,
    *parameters: Tensor,
) -> tuple[Tensor]:
    """The output in operations that can be differentiated again."""
    values = None if rule is None else torch.stack(folded(parameters, rule))
    scale, shift, gain, offset = _rows(rule, values, parameters)
    z = act(norm.reference(x, scale, shift, *statistics))
    z = z if gain is None else per_channel(gain) * z
    z = z if offset is None else z + per_channel(offset)
    return (z.to(x.dtype),)


def per_channel(v: Tensor) -> Tensor:
    """(C,) as (1, C, 1, 1), to act on a map."""
    return v.view(1, -1, 1, 1)


def _head_sums(
    grad: Tensor, z: Tensor | None, gain: Tensor | None, offset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of gain and offset: Σ grad·φ and Σ grad over samples and positions, (C,)."""
    if gain is not None:
        # in one pass, as the gradients of a batch norm's weight and bias: φ = (z − offset) / gain
        _, by_gain, by_offset = aten.native_batch_norm_backward(
            grad, z, gain, None, None, offset, gain.reciprocal(), True, 0.0, [False, True, True]
        )
        return by_gain, by_offset
    if offset is None:
        return None, None
    # in two steps: in one, of channels that lie innermost, a CPU takes up to twice the time
    return None, grad.sum((2, 3), dtype=offset.dtype).sum(0)


def _head_(
    u: Tensor, floor: Tensor | None, gain: Tensor | None, offset: Tensor | None, act: nn.Module
) -> Tensor:
    """max(u, floor), if there is a floor, else gain·φ(u) + offset; in place."""
    if floor is not None:
        return torch.clamp(u, min=per_channel(floor), out=u)
    z = _activate_(u, act)
    if offset is None:
        return z
    offset = per_channel(offset)
    if gain is None:
        return torch.add(z, offset, out=z)
    # one pass, which rounds half precision once; two are faster for contiguous single precision
    gain = per_channel(gain)
    if z.dtype == gain.dtype and z.is_contiguous():
        return z.mul_(gain).add_(offset)
    return torch.addcmul(offset, z, gain, out=z)


def _activate_(u: Tensor, act: nn.Module) -> Tensor:
    """φ(u), in place."""
    name = activation_name(act)
    if name == "relu":
        return torch.relu_(u)
    if name == "silu":
        return aten.silu_(u)
    if name in _GELU:
        return aten.gelu_(u, approximate=_GELU[name])
    return u if name == "identity" else u.copy_(act(u))


def _act_backward(grad: Tensor, u: Tensor, act: nn.Module) -> Tensor:
    """grad·φ'(u), in memory of its own or in u's."""
    name = activation_name(act)
    if name == "relu":
        return aten.threshold_backward.grad_input(grad, u, 0, grad_input=u)
    if name == "silu":
        return aten.silu_backward.grad_input(grad, u, grad_input=u)
    if name in _GELU:
        return aten.gelu_backward.grad_input(grad, u, approximate=_GELU[name], grad_input=u)
    with torch.enable_grad():
        u.requires_grad_()
        return torch.autograd.grad(act(u), u, grad)[0]


_GELU = {"gelu": "none", "gelu_tanh": "tanh"}
