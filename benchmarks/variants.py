"""What the step and memory benchmarks compare: our norms, and torch's own modules written out as timm has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from proxynorm.conversion.freeze import freeze
from proxynorm.errors import ConfigError
from proxynorm.models import create_model
from proxynorm.nn import NORMS, NormAct2d, recompute
from proxynorm.nn.checks import unknown_name

TORCH_BN, TORCH_LN = "torch bn", "torch ln"
RECOMPUTE = "+recompute"
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Variant:
    """One column of the comparison. norm: a norm, a norm with "+recompute", or one of the two torch baselines."""

    norm: str
    memory_format: str
    compiled: bool = False

    @property
    def mode(self) -> str:
        return "compiled" if self.compiled else "eager"


def check_norm(name: str) -> None:
    """Raises ConfigError for a name that build does not know."""
    legal = (
        TORCH_BN,
        TORCH_LN,
        *NORMS,
        *(f"{norm}{RECOMPUTE}" for norm in NORMS if norm.endswith("_pn")),
    )
    if name not in legal:
        raise ConfigError(unknown_name("norm", name, legal))


def build(variant: Variant, model: str, device: torch.device) -> nn.Module:
    """The network of a variant, for training, with the same initial convolutions for all. Raises ConfigError."""
    torch.manual_seed(0)
    if variant.norm in (TORCH_BN, TORCH_LN):
        net = _written_out(create_model(model, variant.norm[-2:]), _TORCH_NORMS[variant.norm])
    else:
        net = create_model(model, variant.norm.removesuffix(RECOMPUTE))
        net = recompute(net) if variant.norm.endswith(RECOMPUTE) else net
    return net.to(device, memory_format=FORMATS[variant.memory_format]).train()


def for_inference(variant: Variant, net: nn.Module) -> nn.Module:
    """The frozen network of a trained one; torch's own stay as they are, but for eval()."""
    if variant.norm in (TORCH_BN, TORCH_LN):
        return copy.deepcopy(net).eval()
    return freeze(net).eval()


_TORCH_NORMS: dict[str, Callable[[NormAct2d], nn.Module]] = {
    TORCH_BN: lambda layer: nn.BatchNorm2d(layer.num_features, layer.eps),
    TORCH_LN: lambda layer: nn.GroupNorm(1, layer.num_features, layer.eps),
}


def _written_out(net: nn.Module, make_norm: Callable[[NormAct2d], nn.Module]) -> nn.Module:
    """Every NormAct2d as a norm module of torch's and its activation, in place as in timm."""
    for name, child in list(net.named_children()):
        if isinstance(child, NormAct2d):
            act = copy.deepcopy(child.act)
            if hasattr(act, "inplace"):
                act.inplace = True
            setattr(net, name, nn.Sequential(make_norm(child), act))
        else:
            _written_out(child, make_norm)
    return net
