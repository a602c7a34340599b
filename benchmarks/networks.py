"""The networks that benchmarks compare, with our norms or with torch's own modules."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from proxynorm.models import create_model
from proxynorm.nn import NORMS, NormAct2d, recompute
from proxynorm.nn.freeze import freeze, replace_modules

TORCH_BN, TORCH_LN = "torch bn", "torch ln"
RECOMPUTE = "+recompute"
# the norms that `build` takes
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
        layers = [module for module in net.modules() if isinstance(module, NormAct2d)]
        replace_modules(net, {layer: torch_layer(layer, norm) for layer in layers})
    elif norm.endswith(RECOMPUTE):
        net = recompute(net)
    return net.to(device, memory_format=FORMATS[memory_format]).train()


def for_inference(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode, the constants of our norms folded."""
    ours = any(isinstance(module, NormAct2d) for module in net.modules())
    return freeze(net) if ours else copy.deepcopy(net).eval()


def torch_layer(layer: NormAct2d, norm: str) -> nn.Module:
    """torch's norm and an in-place activation, to replace a NormAct2d, as in timm."""
    if norm == TORCH_BN:
        normalize: nn.Module = nn.BatchNorm2d(layer.num_features, layer.eps)
    else:
        normalize = nn.GroupNorm(1, layer.num_features, layer.eps)
    act = copy.deepcopy(layer.act)
    if hasattr(act, "inplace"):
        act.inplace = True  # so that the activation keeps no map of its own for backward
    return nn.Sequential(normalize, act)


def random_images(batch: int, size: int, memory_format: str, device: torch.device) -> Tensor:
    """Images (batch, 3, size, size) of noise."""
    images = torch.randn(batch, 3, size, size, device=device)
    return images.contiguous(memory_format=FORMATS[memory_format])
