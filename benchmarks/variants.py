"""The networks that the step and memory benchmarks compare: our norms, and torch's own modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from proxynorm.cli import nearest
from proxynorm.errors import ConfigError
from proxynorm.models import create_model
from proxynorm.nn import NORMS, NormAct2d, recompute
from proxynorm.nn.freeze import freeze

TORCH_BN, TORCH_LN = "torch bn", "torch ln"
RECOMPUTE = "+recompute"
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: a norm, also with "+recompute", or one of torch's two."""

    norm: str
    memory_format: str
    mode: str = "eager"


def check_norms(names: list[str]) -> None:
    """Raise ConfigError for an empty list or a name that `build` does not know."""
    recomputed = [norm + RECOMPUTE for norm in NORMS if norm.endswith("_pn")]
    known = (TORCH_BN, TORCH_LN, *NORMS, *recomputed)
    if not names:
        raise ConfigError("norms=[]: name at least one")
    for name in names:
        if name not in known:
            raise ConfigError(f"no norm '{name}'; {nearest(name, known)}")


def build(variant: Variant, model: str, device: torch.device) -> nn.Module:
    """The network of a variant, in training mode, with equal initial weights for all."""
    torch.manual_seed(0)
    if variant.norm in (TORCH_BN, TORCH_LN):
        net = create_model(model, variant.norm.removeprefix("torch "))
        use_torch_norms(net, variant.norm)
    else:
        net = create_model(model, variant.norm.removesuffix(RECOMPUTE))
        net = recompute(net) if variant.norm.endswith(RECOMPUTE) else net
    return net.to(device, memory_format=FORMATS[variant.memory_format]).train()


def for_inference(variant: Variant, net: nn.Module) -> nn.Module:
    """A copy in evaluation mode, its proxy constants folded."""
    if variant.norm in (TORCH_BN, TORCH_LN):
        return copy.deepcopy(net).eval()
    return freeze(net).eval()


def use_torch_norms(net: nn.Module, norm: str) -> None:
    """Replace every NormAct2d by torch's norm and the activation, in place as in timm."""
    for name, child in list(net.named_children()):
        if not isinstance(child, NormAct2d):
            use_torch_norms(child, norm)
            continue
        act = copy.deepcopy(child.act)
        # In place, the activation keeps no map of its own for the backward pass.
        if hasattr(act, "inplace"):
            act.inplace = True
        if norm == TORCH_BN:
            layer = nn.BatchNorm2d(child.num_features, child.eps)
        else:
            layer = nn.GroupNorm(1, child.num_features, child.eps)
        setattr(net, name, nn.Sequential(layer, act))
