"""The small pre-activation ResNet for 32-pixel images.

These are the CIFAR networks of He et al., "Identity Mappings in Deep Residual Networks" (2016).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import nn

from proxynorm.nn.checks import check_whole

# In channels_last, oneDNN's backward of a strided 1×1 convolution with fewer input channels than
# this writes out of bounds (uxlfoundation/oneDNN#6035). Such shortcuts subsample the map first.
ONEDNN_BLOCK = 16


class PreActBlock(nn.Module):
    """norm+act, 3×3, norm+act, 3×3, plus a shortcut, which is a 1×1 if the shape changes.

    Args:
        stride: of the first convolution and of the shortcut.
        norm_layer: makes a norm+act layer from a number of channels.
        drop_path_rate: probability that a sample skips the branch.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        norm_layer: Callable[[int], nn.Module],
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = norm_layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.shortcut, self.sample_stride = None, 1
        if stride != 1 or in_channels != channels:
            if in_channels < ONEDNN_BLOCK:
                self.sample_stride, stride = stride, 1
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) → (N, channels, H / stride, W / stride)."""
        z = self.norm1(x)
        shortcut = x
        if self.shortcut is not None:
            step = self.sample_stride
            shortcut = self.shortcut(z if step == 1 else z[..., ::step, ::step])
        branch = self.conv2(self.norm2(self.conv1(z)))
        return self.drop_path(branch) + shortcut


class StandardizePixels(nn.BatchNorm1d):
    """Standardization of each pixel over the batch; in evaluation, by running statistics.

    ε is larger than usual, because some pixels hardly vary.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__(channels * side * side, eps=1e-2, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, side, side) → the same shape."""
        return super().forward(x.flatten(1)).view_as(x)


class SmallResNetV2(nn.Module):
    """3×3 stem, three stages of blocks (width, 2·width, 4·width), norm+act, pool, classifier.

    Args:
        norm_layer: makes a norm+act layer from a number of channels.
        depth: 6n + 2 with n blocks per stage (20, 32, 44, 56, 80, 110 …).
        width: channels of the first stage.
        stem_stride: stride of the stem; 2 saves three quarters of the computation.
        num_classes: length of the logits.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        standardize_pixels: side of the images, to standardize each pixel over the batch before the
            stem; None: do not standardize.

    Raises:
        ValueError: depth is not 6n + 2, or width or stem_stride is out of range.
    """

    def __init__(
        self,
        norm_layer: Callable[[int], nn.Module],
        depth: int = 20,
        width: int = 16,
        stem_stride: int = 1,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        standardize_pixels: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("width", width)):
            check_whole(name, value, 1)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth} is not 6n + 2: use 8, 14, 20, 32, 44, 56, 80, 110 …")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride={stem_stride}: it must be 1 or 2")
        self.num_classes = num_classes
        self.num_features = 4 * width
        blocks = (depth - 2) // 6
        self.pixels = (
            StandardizePixels(in_chans, standardize_pixels) if standardize_pixels else nn.Identity()
        )
        self.stem = nn.Conv2d(in_chans, width, 3, stride=stem_stride, padding=1, bias=False)
        stages, in_channels = [], width
        for i, rates in enumerate(
            calculate_drop_path_rates(drop_path_rate, [blocks] * 3, stagewise=True)
        ):
            stage, channels = [], width * 2**i
            for j, rate in enumerate(rates):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(PreActBlock(in_channels, channels, stride, norm_layer, rate))
                in_channels = channels
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.norm = norm_layer(self.num_features)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.num_features, num_classes)
        # He initialisation by fan-out for the convolutions, torch's default for the classifier.
        # Smaller classifier weights slow norms whose pooled activations are centred: with std 0.01,
        # LN+PN lags in the first epochs and IN+PN hardly learns.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) → the last map, normalized and activated."""
        return self.norm(self.stages(self.stem(self.pixels(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) → logits (N, num_classes)."""
        return self.fc(self.dropout(self.pool(self.forward_features(x)).flatten(1)))
