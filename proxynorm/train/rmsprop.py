"""RMSprop as TensorFlow computes it, the EfficientNet recipe's optimizer, in few kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class RMSpropTF(Optimizer):
    """timm's RMSpropTF over all tensors at once, able to skip a step on the device.

    s ← s + (1 − α)(g² − s);  b ← μb + lr · g / sqrt(s + ε);  p ← p − b, where the gradient g
    includes the weight decay (L2), s starts at one and b at zero. State keys are those of timm's.
    """

    _step_supports_amp_scaling = True  # GradScaler, and step_if, set found_inf instead of waiting
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None  # unused: the loop unscales gradients before it clips them

    def __init__(
        self,
        params: Iterable,
        lr: float,
        alpha: float = 0.9,
        eps: float = 1e-10,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"alpha": alpha, "eps": eps, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, **options})

    def step(self, closure: None = None) -> None:
        """Make one update; where found_inf is one, leave weights and state as they are."""
        keep = None if self.found_inf is None else 1.0 - self.found_inf
        if keep is not None and keep.device.type == "cpu":  # the host knows: nothing to compute
            if not keep:
                return
            keep = None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, keep)

    @torch.no_grad()
    def _update(self, group: dict, params: list[Tensor], keep: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["square_avg"] = torch.ones_like(p)
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        squares = [self.state[p]["square_avg"] for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        rate, rest, momentum = group["lr"], 1.0 - group["alpha"], group["momentum"]
        if keep is not None:
            # Zero times NaN is NaN, but not for its bits: as integers, bad gradients become zero.
            # With gradient, rates and the change of b gone, every sum below adds an exact zero.
            torch._foreach_mul_([g.view(torch.int32) for g in grads], keep.int())
            rate, rest, momentum = rate * keep, rest * keep, 1.0 - (1.0 - momentum) * keep
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        change = torch._foreach_mul(grads, grads)
        torch._foreach_sub_(change, squares)
        torch._foreach_mul_(change, rest)
        torch._foreach_add_(squares, change)
        root = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(root)
        torch._foreach_mul_(buffers, momentum)
        update = torch._foreach_div(grads, root)
        torch._foreach_mul_(update, rate)
        torch._foreach_add_(buffers, update)
        update = buffers if keep is None else torch._foreach_mul(buffers, keep)
        torch._foreach_sub_(params, update)
