"""Weight standardization of convolutions, and the parameter groups for weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from proxynorm.nn.fast.precision import without_autocast
from proxynorm.nn.norm_act import NormAct2d

_EPS = 1e-10  # of weight standardization, added to the variance
_NEVER_DECAYED = (nn.LayerNorm, nn.Embedding, nn.EmbeddingBag)  # their weights may be matrices


class StandardizedWeight(nn.Module):
    """Gives each filter mean 0 and variance 1 / fan-in, over its input channels and positions."""

    def forward(self, weight: Tensor) -> Tensor:
        with without_autocast(weight.device):
            dims = tuple(range(1, weight.ndim))
            var, mean = torch.var_mean(weight, dim=dims, keepdim=True, correction=0)
            return (weight - mean) * torch.rsqrt((var + _EPS) * weight[0].numel())


def standardize_weights(model: nn.Module) -> nn.Module:
    """Standardize the weights of every nn.Conv2d of a model, in place; return the model.

    Qiao et al., arXiv 1903.10520. The factor 1/sqrt(fan-in) gives the following norm an input of
    unit scale, and that norm cancels it. A convolution with one weight per filter (depthwise 1×1)
    has no variance and is left as it is, as is one that is already parametrized.
    """
    for module in list(model.modules()):
        if (
            isinstance(module, nn.Conv2d)
            and not parametrize.is_parametrized(module, "weight")
            and module.weight[0].numel() > 1
        ):
            parametrize.register_parametrization(module, "weight", StandardizedWeight())
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into two optimizer groups, decayed and not.

    Weight decay applies to weight matrices and kernels (two or more dimensions) outside of norms
    and embeddings, and to PN's γ̃ and β̃ (with the same coefficient, as in the authors' code). It
    does not apply to γ, β, biases, tokens or any other parameter. A parameter that several modules
    share is listed once.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for path, parameter in model.named_parameters():  # a shared parameter comes once
        owner, _, name = path.rpartition(".")
        if parameter.requires_grad:
            is_decayed = _is_decayed(model.get_submodule(owner), name, parameter)
            (decayed if is_decayed else not_decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, NormAct2d):
        return name in ("proxy_weight", "proxy_bias")
    if isinstance(module, _NEVER_DECAYED) or parameter.ndim < 2:
        return False
    # "original" is the weight behind a parametrization, such as weight standardization. The name
    # distinguishes a kernel from CondConv2d's biases (experts, C) and from tokens (1, length, C).
    return name.endswith("weight") or name.startswith("original")
