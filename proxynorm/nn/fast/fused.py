"""PN-Act on the norm's own affine: constants per channel, and heads that follow the norm in place.

With r = 1/sqrt(v + ε), for ReLU: r·(max(γy + β, 0) − m) = max(rγ·y + r(β − m), −r·m). The norm's
affine takes the scale and the shift; a floor per channel replaces zero. Other activations:
gain·φ(γy + β) + offset with gain = r, offset = −r·m. Either way the output overwrites u = γy + β.
Backward keeps the norm's input and the output, which the next convolution keeps anyway; where it
needs u, it rebuilds u from the norm's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from proxynorm.nn.fast.folding import Constants, pull_back

aten = torch.ops.aten


class Head(NamedTuple):
    """An activation: its canonical name and its module, which must leave its input alone."""

    name: str
    module: nn.Module


class FoldedConstants(torch.autograd.Function):
    """The rows of constants.values, as a differentiable function of γ, β, γ̃, β̃, each (C,).

    reference((γ, β, γ̃, β̃)) is the same in differentiable operations, for second derivatives.
    """

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        bias: Tensor,
        proxy_weight: Tensor,
        proxy_bias: Tensor,
        constants: Constants,
        reference: Callable[..., tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        ctx.reference = reference
        ctx.set_materialize_grads(False)  # a squeeze-excite gate asks for the last row alone
        ctx.save_for_backward(weight, bias, proxy_weight, proxy_bias, constants.jacobian)
        return constants.values.unbind()

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple:
        *parameters, jacobian = ctx.saved_tensors
        if any(grad is not None and by_formula(grad) for grad in grads):
            slopes = differentiable(lambda *p: ctx.reference(p), parameters, grads)
        else:
            slopes = pull_back(jacobian, grads)
        return (
            *(
                s if s is None or s.dtype == p.dtype else s.to(p.dtype)
                for s, p in zip(slopes, parameters)
            ),
            None,
            None,
        )


def by_formula(grad: Tensor) -> bool:
    """True if a backward pass must use plain operations: for second derivatives, or batched."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiable(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor | None],
    grads: tuple[Tensor | None, ...],
) -> list:
    """Gradients of function(*inputs) by the inputs that require one; None for the others.

    They can be differentiated again where grad mode is on.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases end autograd's search here. One input may depend on another: tied parameters, or a
        # layer that is used twice.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        outputs = function(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    # constant outputs have no gradient: the gain under proxy_scale=False, or frozen γ and β
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads)
        if grad is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs)
    slopes = iter(
        torch.autograd.grad(outputs, wanted, grads, create_graph=again, allow_unused=True)
    )
    return [next(slopes) if t is not None and t.requires_grad else None for t in inputs]


class FlooredReLU(torch.autograd.Function):
    """max(u, floor), in place of u (N, C, H, W).

    u = … + floor, so that floor's gradient is the whole gradient of the output; the caller detaches
    the floor that it adds to the norm's shift. watch gets the output before it is saved.
    """

    @staticmethod
    def forward(
        ctx, u: Tensor, floor: Tensor, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        ctx.mark_dirty(u)
        ctx.save_for_backward(floored_relu_(u, floor), floor)
        if watch is not None:
            watch(u)
        return u

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, floor = ctx.saved_tensors
        total = channel_sum(grad)
        if by_formula(grad):
            return torch.where(z > per_channel(floor).to(z.dtype), grad, 0), total, None
        return floored_relu_backward(grad, z, floor), total, None


class GainedActivation(torch.autograd.Function):
    """gain·φ(u) + offset, in place of u = norm(x, weight=scale, bias=shift); gain None is 1.

    The backward pass calls norm again: norm has no side effects and gives the same again.
    x, scale and shift get their gradients through u.
    """

    @staticmethod
    def forward(
        ctx,
        u: Tensor,
        gain: Tensor | None,
        offset: Tensor,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        head: Head,
        norm: Callable[..., Tensor],
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        ctx.mark_dirty(u)
        ctx.head, ctx.norm = head, norm
        ctx.save_for_backward(
            gained_activation_(u, gain, offset, head), gain, offset, x, scale, shift
        )
        if watch is not None:
            watch(u)
        return u

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        z, gain, offset, x, scale, shift = ctx.saved_tensors
        with torch.set_grad_enabled(by_formula(grad)):
            u = ctx.norm(x, weight=scale, bias=shift)
        if by_formula(grad):

            def reference(u: Tensor, gain: Tensor | None, offset: Tensor) -> tuple[Tensor]:
                return (
                    (
                        per_channel(offset)
                        + (1 if gain is None else per_channel(gain)) * ctx.head.module(u)
                    ).to(grad.dtype),
                )

            return *differentiable(reference, [u, gain, offset], (grad,)), *[None] * 6
        product, total = gained_sums(grad, z, gain, offset)
        du = activation_backward(grad, u, ctx.head)
        if gain is not None:
            du.mul_(per_channel(gain).to(grad.dtype))
        return du, product, total, *[None] * 6


def gained_sums(
    grad: Tensor, z: Tensor, gain: Tensor | None, offset: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The gradients of gain and offset in gain·φ + offset: Σ grad·φ and Σ grad, each (C,)."""
    if gain is None:
        return None, channel_sum(grad)
    # in one pass, as the gradients of a batch norm's weight and bias: φ = (z − offset) / gain
    return aten.native_batch_norm_backward(
        grad, z, gain, None, None, offset, gain.reciprocal(), True, 0.0, [False, True, True]
    )[1:]


def per_channel(v: Tensor) -> Tensor:
    """(C,) as (1, C, 1, 1), to act on a map."""
    return v.view(1, -1, 1, 1)


def channel_sum(grad: Tensor) -> Tensor:
    """Sum over samples and positions, (C,), in float32 or better."""
    # in two steps: in one, of channels that lie innermost, a CPU takes up to twice the time
    return grad.sum((2, 3), dtype=torch.promote_types(grad.dtype, torch.float32)).sum(0)


def floored_relu_(u: Tensor, floor: Tensor) -> Tensor:
    """max(u, floor), in place."""
    return torch.clamp(u, min=per_channel(floor).to(u.dtype), out=u)


def floored_relu_backward(grad: Tensor, z: Tensor, floor: Tensor) -> Tensor:
    """The gradient of u in z = max(u, floor)."""
    above = z - per_channel(floor).to(z.dtype)  # 0 exactly where the floor cut
    return aten.threshold_backward.grad_input(grad, above, 0, grad_input=above)


def gained_activation_(u: Tensor, gain: Tensor | None, offset: Tensor, head: Head) -> Tensor:
    """gain·φ(u) + offset, in place."""
    return gained_(_activate_(u, head), gain, offset)


def gained_activation(u: Tensor, gain: Tensor | None, offset: Tensor, head: Head) -> Tensor:
    """gain·φ(u) + offset; u is left alone."""
    z = head.module(u)
    return gained_(z.clone() if z.data_ptr() == u.data_ptr() else z, gain, offset)


def gained_(z: Tensor, gain: Tensor | None, offset: Tensor) -> Tensor:
    """gain·z + offset, in place."""
    # one pass, which rounds half precision once; two are faster for contiguous single precision
    offset = per_channel(offset)
    if gain is None:
        return torch.add(z, offset, out=z)
    gain = per_channel(gain)
    if z.dtype == gain.dtype and z.is_contiguous():
        return z.mul_(gain).add_(offset)
    return torch.addcmul(offset, z, gain, out=z)


def _activate_(u: Tensor, head: Head) -> Tensor:
    """φ(u), in place."""
    if head.name == "relu":
        return torch.relu_(u)
    if head.name == "silu":
        return aten.silu_(u)
    if head.name in ("gelu", "gelu_tanh"):
        return aten.gelu_(u, approximate=_approximation(head))
    return u.copy_(head.module(u))


def activation_backward(grad: Tensor, u: Tensor, head: Head) -> Tensor:
    """grad·φ'(u), in memory of its own or in u's."""
    if head.name == "relu":
        return aten.threshold_backward.grad_input(grad, u, 0, grad_input=u)
    if head.name == "silu":
        return aten.silu_backward.grad_input(grad, u, grad_input=u)
    if head.name in ("gelu", "gelu_tanh"):
        return aten.gelu_backward.grad_input(
            grad, u, approximate=_approximation(head), grad_input=u
        )
    with torch.enable_grad():
        u.requires_grad_()
        slope = torch.autograd.grad(head.module(u), u, grad)[0]
    # the identity's gradient is grad itself, which must not be overwritten
    return slope.clone() if slope.data_ptr() == grad.data_ptr() else slope


def _approximation(head: Head) -> str:
    return "tanh" if head.name == "gelu_tanh" else "none"
