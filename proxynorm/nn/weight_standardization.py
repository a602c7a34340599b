"""Weight standardization: each output filter of a convolution has zero mean and unit variance over its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from proxynorm.nn.fast.precision import without_autocast


class StandardizedWeight(nn.Module):
    """(w − mean) / sqrt(var + eps) over a filter's inputs and positions, scaled by 1/sqrt(fan-in)."""

    def __init__(self, eps: float = 1e-10) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        with without_autocast(weight.device):
            dims = tuple(range(1, weight.ndim))
            var, mean = torch.var_mean(weight, dim=dims, keepdim=True, correction=0)
            return (weight - mean) * torch.rsqrt((var + self.eps) * weight[0].numel())


def standardize_weights(model: nn.Module) -> nn.Module:
    """Puts weight standardization on every nn.Conv2d of model that has none yet; returns the model.

    Qiao et al., arXiv 1903.10520. The factor 1/sqrt(fan-in) leaves what the following norm sees at unit scale and is
    undone by it. A convolution with a single weight per filter (depthwise 1×1) has no variance and is left alone.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d) and not parametrize.is_parametrized(module, "weight"):
            if module.weight[0].numel() > 1:
                parametrize.register_parametrization(module, "weight", StandardizedWeight())
    return model
