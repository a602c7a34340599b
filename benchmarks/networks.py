"""The networks that benchmarks compare: those with our norms, and with torch's own modules."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from proxynorm.models import create_model
from proxynorm.nn import NORMS, NormAct2d, recompute
from proxynorm.nn.freeze import freeze

TORCH_BN, TORCH_LN = "torch bn", "torch ln"
RECOMPUTE = "+recompute"
# What `build` knows.
ALL_NORMS = (TORCH_BN, TORCH_LN, *NORMS, *(n + RECOMPUTE for n in NORMS if n.endswith("_pn")))
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CPU = torch.device("cpu")


def build(
    norm: str, model: str, memory_format: str = "nchw", device: torch.device = CPU
) -> nn.Module:
    """A network in training mode; the initial weights are the same for all norms."""
    torch.manual_seed(0)
    net = create_model(model, norm.removeprefix("torch ").removesuffix(RECOMPUTE))
    if norm in (TORCH_BN, TORCH_LN):
        use_torch_norms(net, norm)
    elif norm.endswith(RECOMPUTE):
        net = recompute(net)
    return net.to(device, memory_format=FORMATS[memory_format]).train()


def for_inference(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode, the constants of our norms folded."""
    ours = any(isinstance(module, NormAct2d) for module in net.modules())
    return freeze(net) if ours else copy.deepcopy(net).eval()


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


def random_images(batch: int, size: int, memory_format: str, device: torch.device) -> Tensor:
    """Images (batch, 3, size, size) of noise."""
    images = torch.randn(batch, 3, size, size, device=device)
    return images.contiguous(memory_format=FORMATS[memory_format])
