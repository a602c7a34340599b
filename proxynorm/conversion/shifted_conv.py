"""A convolution that adds a constant per channel to its input, at the price of the border alone where that is faster.

A shift does not commute with zero padding: over the inside of the map it adds a constant to each output channel, which
the bias takes, and towards the border less and less, since the padding is not shifted. So the border is put right after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proxynorm.nn.fast.precision import is_transformed, without_autocast

SMALLEST = 24  # of smaller maps (pixels a side of the output) the border is too large a part


class ShiftedConv2d(nn.Conv2d):
    """conv(x + shift) of an nn.Conv2d with zero padding; shift has a value per input channel. For inference.

    The border is put right where channels lie innermost on a CPU, whose convolutions take a bias for nothing; elsewhere
    the map is shifted.
    """

    shift: Tensor

    @classmethod
    def take_over(cls, conv: nn.Conv2d, shift: Tensor) -> None:
        """Makes conv such a convolution, with the state-dict keys it had and "shift", shape (C,)."""
        conv.__class__ = cls
        conv.register_buffer("shift", shift.to(conv.weight.dtype))
        conv._border = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H', W'). May overwrite x."""
        if is_transformed():
            return super().forward(x + self.shift.view(1, -1, 1, 1))
        inside = [
            _inside(*side)
            for side in zip(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation)
        ]
        innermost = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        large = min(last - first for first, last in inside) >= SMALLEST
        if not (large and innermost and x.device.type == "cpu"):
            shift = self.shift.view(1, -1, 1, 1)
            return super().forward(x + shift if x.requires_grad else x.add_(shift))
        bias, strips = self._corrections(x.shape[2:], inside)
        y = self._conv_forward(x, self.weight, bias)
        for (rows, columns), correction in strips:
            y[:, :, rows, columns] += correction
        return y

    def _corrections(self, size: torch.Size, inside: list[tuple[int, int]]) -> tuple[Tensor, list]:
        """The bias with what the shift adds inside, and for the border's four strips what it adds there beyond that.
        Kept for the next map of this size, while weight, bias and shift have the values that they had."""
        tensors = [t for t in (self.weight, self.bias, self.shift) if t is not None]
        if self._border is None or self._border[0] != size or not _equal(self._border[1], tensors):
            with torch.inference_mode(False), torch.no_grad(), without_autocast(self.weight.device):
                self._border = (
                    size,
                    [t.clone() for t in tensors],
                    *self._measure_border(size, *inside),
                )
        return self._border[2:]

    def _measure_border(
        self, size: torch.Size, rows: tuple[int, int], columns: tuple[int, int]
    ) -> tuple[Tensor, list]:
        ground = self.shift.view(1, -1, 1, 1).expand(1, -1, *size)
        added = F.conv2d(
            ground, self.weight, None, self.stride, self.padding, self.dilation, self.groups
        )
        (top, bottom), (left, right) = rows, columns
        constant = added[0, :, top, left]
        rest = (added - constant.view(1, -1, 1, 1)).contiguous(memory_format=torch.channels_last)
        places = [
            (slice(None, top), slice(None)),
            (slice(bottom, None), slice(None)),
            (slice(top, bottom), slice(None, left)),
            (slice(top, bottom), slice(right, None)),
        ]
        strips = [(place, rest[:, :, place[0], place[1]].clone()) for place in places]
        bias = constant.clone() if self.bias is None else self.bias + constant
        return bias, [(place, strip) for place, strip in strips if strip.numel()]


def _equal(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether the tensors are the same by type and value, however they were changed."""
    return len(before) == len(now) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, now)
    )


def _inside(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """First and past-the-last output position along one side whose window holds no padding."""
    first = -(-padding // stride)
    return first, max(first, (size + padding - dilation * (kernel - 1) - 1) // stride + 1)
