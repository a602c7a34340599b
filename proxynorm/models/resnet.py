"""timm's models, and the pre-activation ResNeXt-50, which timm does not have."""

from __future__ import annotations

import timm
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn

_CARDINALITY = 32


def from_timm(timm_name: str, drop_path_rate: float = 0.0, **kwargs: object) -> nn.Module:
    """Build the timm model of that name. Raises TypeError for arguments that it does not take.

    A drop_path_rate of 0 is allowed for models without stochastic depth, too.
    """
    try:
        return timm.create_model(timm_name, drop_path_rate=drop_path_rate, **kwargs)
    except TypeError as error:
        if drop_path_rate != 0 or "drop_path_rate" not in str(error):
            raise
        return timm.create_model(timm_name, **kwargs)


def resnext50v2(**kwargs: object) -> ResNetV2:
    """Build a pre-activation ResNeXt-50 (32×4d): ResNet-50 v2 with bottlenecks twice as wide."""
    return ResNetV2(
        [3, 4, 6, 3],
        bottle_ratio=0.5,
        conv_layer=_grouped_conv2d,
        norm_layer=BatchNormAct2d,
        **kwargs,
    )


def _grouped_conv2d(
    in_channels: int, out_channels: int, kernel_size: int, **kwargs: object
) -> nn.Conv2d:
    """Build timm's convolution, with 32 groups if 3×3. ResNetV2 has no option for groups."""
    if kernel_size == 3:
        kwargs["groups"] = _CARDINALITY
    return create_conv2d(in_channels, out_channels, kernel_size, **kwargs)
