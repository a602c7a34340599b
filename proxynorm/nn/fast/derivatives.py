"""The fallback of hand-written backward passes: let autograd differentiate plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def by_formula(grad: Tensor) -> bool:
    """True if backward must use plain operations: for second derivatives or batched gradients."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiable(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of function(*inputs) for the inputs that require one; None for the others.

    If grad mode is on, they can be differentiated again.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # One input may depend on another: with tied parameters, or in a layer that is used twice.
        # Autograd's search ends at an alias.
        inputs = [t.view_as(t) for t in inputs]
        output = function(*inputs)
    if not output.requires_grad:  # it depends on frozen parameters only
        return [None] * len(inputs)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=again, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]
