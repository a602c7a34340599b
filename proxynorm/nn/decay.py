"""Which parameters weight decay touches: convolution and linear weights, γ̃ and β̃; never γ, β or other biases."""

from __future__ import annotations

from torch import nn

from proxynorm.nn.norm_act import NormAct2d

_DECAYED_WEIGHT = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two optimizer groups, decayed and not, that hold every parameter that requires a gradient exactly once.

    Decayed are the weights of convolutions and linear layers and PN's γ̃ and β̃ (as in the authors' code, with the
    ordinary coefficient); norms' γ and β, biases and all other parameters are not. The kind of module decides, not
    the shape.
    """
    decayed, kept, seen = [], [], set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            (decayed if _is_decayed(module, name) else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_decayed(module: nn.Module, name: str) -> bool:
    if isinstance(module, NormAct2d):
        return name in ("proxy_weight", "proxy_bias")
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return name.startswith(
            "original"
        )  # the weight behind a parametrization such as weight standardization
    return isinstance(module, _DECAYED_WEIGHT) and name == "weight"
