"""The fallback of hand-written backward passes: let autograd differentiate plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def by_formula(grad: Tensor) -> bool:
    """True if backward must use plain operations: for second derivatives or batched gradients."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiable(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of function(*inputs) by the inputs that require one; None for the others.

    If grad mode is on, they can be differentiated again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may depend on another: with tied parameters, or in a layer that is used twice.
        # At an alias, autograd's search ends.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        outputs = function(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    # outputs without a gradient are constant: a gain of 1, or frozen γ and β
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads)
        if grad is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs)
    results = iter(
        torch.autograd.grad(outputs, wanted, grads, create_graph=again, allow_unused=True)
    )
    return [next(results) if t is not None and t.requires_grad else None for t in inputs]
