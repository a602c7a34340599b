"""EfficientNet B0…B5 with group convolutions, and the placement of PN around squeeze-excite.

timm's EfficientNets are G1: depthwise convolutions, expansion 6. G16 has groups of 16 channels and
expansion 4. It is the variant of "Making EfficientNet More Efficient" (arXiv 2106.03640), built as
in the authors' code.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

from proxynorm.nn.norm_act import NormAct2d

# Channel and depth multipliers of Tan and Le (arXiv 1905.11946).
_MULTIPLIERS = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
}
# One string per stage, in timm's notation: blocks, kernel, stride, expansion, channels.
_STAGES = [
    ["ds_r1_k3_s1_e1_c16_se0.25"],
    ["ir_r2_k3_s2_e4_c24_se0.25"],
    ["ir_r2_k5_s2_e4_c40_se0.25"],
    ["ir_r3_k3_s2_e4_c80_se0.25"],
    ["ir_r3_k5_s1_e4_c112_se0.25"],
    ["ir_r4_k5_s2_e4_c192_se0.25"],
    ["ir_r1_k3_s1_e4_c320_se0.25"],
]


def efficientnet_g16(size: str, **kwargs: object) -> EfficientNet:
    """Build the EfficientNet of that size, "b0" … "b5", with groups of 16 channels, expansion 4."""
    width, depth = _MULTIPLIERS[size]
    rounded = partial(round_channels, multiplier=width)
    block_args = decode_arch_def(_STAGES, depth, group_size=16)
    for i, block in enumerate(block_args[0]):
        # The first stage has no expansion; its channels per group are as in the authors' code.
        channels = rounded(32 if i == 0 else 16)
        block["group_size"] = channels // max(channels // 16, 1)
    return EfficientNet(
        block_args,
        num_features=rounded(1280),
        stem_size=32,
        round_chs_fn=rounded,
        act_layer=nn.SiLU,
        norm_layer=nn.BatchNorm2d,
        **kwargs,
    )


class CentredGate(nn.Module):
    """Squeeze-excite's gate times PN's scale, 1/sqrt(v + ε), after a PN that only centres.

    Squeeze-excite then pools the centred, unscaled map: the authors' placement. The norm+act layer
    before it belongs to the block and is not registered here.
    """

    def __init__(self, gate: nn.Module, norm: NormAct2d) -> None:
        super().__init__()
        self.gate = gate
        self.register_buffer("scale", None)  # PN's scale, (C,), if it is constant
        # A tuple hides the layer from nn.Module, so that its parameters are registered once.
        self._norm = (norm,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, 1, 1) → (N, C, 1, 1), in x's dtype."""
        scale = self._norm[0].proxy_rescale() if self.scale is None else self.scale
        return (self.gate(x) * scale.view(1, -1, 1, 1)).to(x.dtype)

    def freeze_proxy_scale(self) -> None:
        """Make PN's scale a constant, for inference. Called by proxynorm.freeze."""
        norm = self._norm[0]
        self.scale, self._norm = norm.proxy_rescale().detach().to(norm.proxy_weight.dtype), ()


def centre_squeeze_excite(model: EfficientNet) -> EfficientNet:
    """Move PN's scale into the squeeze-excite gates, and drop it before the last pooling.

    This is the authors' placement, for a model whose norms are NormAct2d with PN. Changes the model
    in place and returns it.
    """
    for block in model.modules():
        if isinstance(block, (DepthwiseSeparableConv, InvertedResidual)) and isinstance(
            block.se, SqueezeExcite
        ):
            # The norm whose output squeeze-excite pools.
            norm = block.bn1 if isinstance(block, DepthwiseSeparableConv) else block.bn2
            norm.proxy_scale = False
            block.se.gate = CentredGate(block.se.gate, norm)
    model.bn2.proxy_scale = False  # the norm of the last map before pooling
    return model
