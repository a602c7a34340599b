"""EfficientNet B0…B5 in two variants and with two placements of PN around squeeze-excite.

G1: depthwise convolutions, expansion 6. G16: groups of 16 channels, expansion 4; the variant of
"Making EfficientNet More Efficient" (arXiv 2106.03640), as the authors' code builds it.
"""

from __future__ import annotations

from functools import partial

import timm
import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

from proxynorm.nn.norm_act import NormAct2d

# Channel and depth multipliers of Tan and Le, arXiv 1905.11946.
_MULTIPLIERS = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
}
# One row a stage: blocks, kernel, stride, channels; the first stage has no expansion.
_STAGES = [
    (1, 3, 1, 16),
    (2, 3, 2, 24),
    (2, 5, 2, 40),
    (3, 3, 2, 80),
    (3, 5, 1, 112),
    (4, 5, 2, 192),
    (1, 3, 1, 320),
]


def efficientnet_g1(size: str, **kwargs: object) -> nn.Module:
    """timm's EfficientNet of that size ("b0" … "b5"): depthwise convolutions, expansion 6."""
    return timm.create_model(f"efficientnet_{size}", **kwargs)


def efficientnet_g16(size: str, **kwargs: object) -> EfficientNet:
    """EfficientNet of that size ("b0" … "b5"): group convolutions of 16 channels, expansion 4."""
    width, depth = _MULTIPLIERS[size]
    rounded = partial(round_channels, multiplier=width)
    stages = []
    for i, (blocks, kernel, stride, channels) in enumerate(_STAGES):
        block, expansion = ("ds", 1) if i == 0 else ("ir", 4)
        stages.append([f"{block}_r{blocks}_k{kernel}_s{stride}_e{expansion}_c{channels}_se0.25"])
    block_args = decode_arch_def(stages, depth, group_size=16)
    for i, block in enumerate(block_args[0]):
        block["group_size"] = _group_size(rounded(32 if i == 0 else 16))
    return EfficientNet(
        block_args,
        num_features=rounded(1280),
        stem_size=32,
        round_chs_fn=rounded,
        act_layer=nn.SiLU,
        norm_layer=nn.BatchNorm2d,
        **kwargs,
    )


def _group_size(channels: int) -> int:
    """Channels per group where there is no expansion, as in the authors' code."""
    return channels // max(channels // 16, 1)


class CentredSqueezeExcite(nn.Module):
    """Squeeze-excite of a tensor that PN only centred: the gate also applies PN's scale.

    x · gate(x) · 1/sqrt(v + ε); the gate pools the centred, unscaled x: the authors' placement.

    Args:
        squeeze_excite: timm's module, whose layers (and their state-dict keys) are taken over.
        norm: the norm+act layer before it; it belongs to the block and is not registered again.
    """

    def __init__(self, squeeze_excite: SqueezeExcite, norm: NormAct2d) -> None:
        super().__init__()
        self.conv_reduce = squeeze_excite.conv_reduce
        self.act1 = squeeze_excite.act1
        self.conv_expand = squeeze_excite.conv_expand
        self.gate = squeeze_excite.gate
        # a tuple hides it from nn.Module, so that its parameters keep one name
        self._norm = (norm,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        squeezed = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        gate = self.gate(self.conv_expand(squeezed)) * self.scale().view(1, -1, 1, 1)
        return x * gate.to(x.dtype)

    def scale(self) -> torch.Tensor:
        """PN's 1/sqrt(v + ε) of the norm before, shape (C,)."""
        return self._norm[0].proxy_rescale()

    def frozen(self) -> FrozenSqueezeExcite:
        """The same for inference, with PN's scale as a constant."""
        return FrozenSqueezeExcite(self)


class FrozenSqueezeExcite(nn.Module):
    """CentredSqueezeExcite with the gate's scale as a buffer."""

    def __init__(self, squeeze_excite: CentredSqueezeExcite) -> None:
        super().__init__()
        self.conv_reduce = squeeze_excite.conv_reduce
        self.act1 = squeeze_excite.act1
        self.conv_expand = squeeze_excite.conv_expand
        self.gate = squeeze_excite.gate
        scale = squeeze_excite.scale().detach().view(1, -1, 1, 1)
        self.register_buffer("scale", scale.to(self.conv_expand.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        squeezed = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * (self.gate(self.conv_expand(squeezed)) * self.scale)


def centre_squeeze_excite(model: EfficientNet) -> EfficientNet:
    """Defer PN's scale to the squeeze-excite gates; drop it before the last pooling.

    The authors' placement, for a model whose norms are NormAct2d with PN. In place; returns the
    model.
    """
    for block in model.modules():
        if isinstance(block, (DepthwiseSeparableConv, InvertedResidual)) and isinstance(
            block.se, SqueezeExcite
        ):
            norm = block.bn1 if isinstance(block, DepthwiseSeparableConv) else block.bn2
            norm.proxy_scale = False
            block.se = CentredSqueezeExcite(block.se, norm)
    model.bn2.proxy_scale = False
    return model
