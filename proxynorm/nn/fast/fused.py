"""gain·φ(norm(x)·scale + shift) + offset, which is PN-Act after folding, as one autograd Function.

The output overwrites u = norm(x)·scale + shift. The norm's input is kept for backward, and the
output if backward needs it; the next convolution keeps the output anyway. If backward needs u, it
computes u again.
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
from proxynorm.nn.fast.recompute import RebuiltOutput, is_recomputing


class NormAct(torch.autograd.Function):
    """z = gain·φ(u) + offset with u = norm(x)·scale + shift; the four constants are (C,).

    With a rule, the parameters are γ, β, γ̃ and β̃, and `constants` has their folded values. Without
    a rule, the parameters are scale and shift, gain is 1 and offset is 0. act must not change its
    input.
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
        ctx.floored, ctx.rebuilt = floor is not None, None
        norm_shift = shift if floor is None else shift + floor
        u, *statistics = norm.forward(x, scale, norm_shift)
        z = _output_(u, floor, gain, offset, act)
        if is_recomputing() and any(ctx.needs_input_grad):
            # Detached, so that the rebuilding function holds no graph.
            kept: list[Any] = [scale, norm_shift, floor, gain, offset]
            kept = [t if t is None else t.detach() for t in kept]

            def rebuild(x: Tensor) -> Tensor:
                scale, norm_shift, floor, gain, offset = kept
                u = norm.replay(x, scale, norm_shift, *statistics)
                return _output_(u, floor, gain, offset, act)

            ctx.rebuilt = RebuiltOutput(rebuild)
            ctx.rebuilt.replaces(z, x)
        keeps_output = ctx.rebuilt is None and (ctx.floored or gain is not None)
        output, ctx.count = z if keeps_output else None, len(parameters)
        ctx.save_for_backward(x, output, values, jacobian, *parameters, *statistics)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, values, jacobian, *rest = ctx.saved_tensors
        parameters, statistics = rest[: ctx.count], rest[ctx.count :]
        if by_formula(grad):
            reference = partial(_reference, ctx.norm, ctx.act, ctx.rule, statistics)
            dx, *by_parameters = differentiable(reference, (x, *parameters), grad)
            return dx, None, None, None, None, *by_parameters
        if ctx.rebuilt is not None:
            z = ctx.rebuilt.take(x, last=True)
        scale, shift, gain, offset = _rows(ctx.rule, values, parameters)
        by_gain, by_offset = _gain_and_offset_gradients(grad, z, gain, offset)
        if ctx.floored and offset is not None:
            above = z - per_channel(offset)  # 0 exactly where the floor applied
            du = aten.threshold_backward.grad_input(grad, above, 0, grad_input=above)
        else:
            u = ctx.norm.replay(x, scale, shift, *statistics)
            du = _act_backward(grad, u, ctx.act)
        # The gain multiplies the constants instead of du, which saves a pass over the map.
        gained = scale if gain is None else scale * gain
        needs_dx = ctx.needs_input_grad[0]
        dx, by_scale, by_shift = ctx.norm.backward(du, x, gained, *statistics, needs_dx)
        if gain is not None:
            by_scale, by_shift = by_scale * gain, by_shift * gain
        if jacobian is None:  # the parameters are scale and shift
            return dx, None, None, None, None, by_scale, by_shift
        by_parameters = pull_back(jacobian, (by_scale, by_shift, by_gain, by_offset), parameters)
        return dx, None, None, None, None, *by_parameters


def _rows(
    rule: Rule | None, values: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """scale, shift, gain and offset.

    A gain of 1 and an offset of 0 are None, because each would cost a pass over the map.
    """
    if rule is None or values is None:
        return parameters[0], parameters[1], None, None
    scale, shift, gain, offset, _ = values.unbind()
    return scale, shift, gain if rule.has_gain else None, offset


def _floor(x: Tensor, gain: Tensor | None, offset: Tensor | None, act: nn.Module) -> Tensor | None:
    """The offset, if z is computed as max(u + offset, offset); None otherwise.

    The norm adds the offset, and z tells backward where u was below 0. In half precision, values
    just above the offset are rounded to it, so backward would miss them. There it computes u again,
    which is exact near 0.
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
) -> Tensor:
    """z in plain operations, which can be differentiated again."""
    values = None if rule is None else torch.stack(folded(parameters, rule))
    scale, shift, gain, offset = _rows(rule, values, parameters)
    z = act(norm.reference(x, scale, shift, *statistics))
    z = z if gain is None else per_channel(gain) * z
    z = z if offset is None else z + per_channel(offset)
    return z.to(x.dtype)


def per_channel(v: Tensor) -> Tensor:
    """(C,) → (1, C, 1, 1), to be combined with a map."""
    return v.view(1, -1, 1, 1)


def _gain_and_offset_gradients(
    grad: Tensor, z: Tensor | None, gain: Tensor | None, offset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of gain and offset, Σ grad·φ and Σ grad over images and positions, (C,)."""
    if gain is not None:
        # Both in one pass: they are the gradients of the weight and bias of a batch norm whose
        # normalized value is φ = (z − offset) / gain.
        _, by_gain, by_offset = aten.native_batch_norm_backward(
            grad, z, gain, None, None, offset, gain.reciprocal(), True, 0.0, [False, True, True]
        )
        return by_gain, by_offset
    if offset is None:
        return None, None
    # In two steps: for channels_last, a CPU takes up to twice as long for a single sum.
    return None, grad.sum((2, 3), dtype=offset.dtype).sum(0)


def _output_(
    u: Tensor, floor: Tensor | None, gain: Tensor | None, offset: Tensor | None, act: nn.Module
) -> Tensor:
    """z from u, in place: max(u, floor) if there is a floor, else gain·φ(u) + offset."""
    if floor is not None:
        return torch.clamp(u, min=per_channel(floor), out=u)
    z = _activate_(u, act)
    if offset is None:
        return z
    offset = per_channel(offset)
    if gain is None:
        return torch.add(z, offset, out=z)
    # One pass rounds half precision only once. For contiguous single precision, two are faster.
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
    """grad·φ'(u), in new memory or in u's."""
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
