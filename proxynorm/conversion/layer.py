"""Make the NormAct2d that replaces a norm, with the norm's parameters and settings."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from proxynorm.conversion.kinds import recognized
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.options import NormOptions


def make_layer(
    name: str,
    norm: Any,
    channels: int,
    activation: nn.Module | None,
    options: NormOptions,
    default: Tensor,
) -> NormAct2d:
    """The new layer, with the old norm's parameters, statistics, ε, momentum, device and mode.

    If the norm has neither parameters nor statistics, device and dtype are those of `default`.
    """
    statistics = (getattr(norm, "weight", None), getattr(norm, "running_mean", None))
    like = next((t for t in statistics if t is not None), default)
    if activation is not None:
        # not copied if it has parameters, which several norms may share
        own = activation if [*activation.parameters()] else copy.deepcopy(activation)
        activation = recognized(own)
    arguments = options.layer_arguments()
    if options.eps is None:
        arguments["eps"] = norm.eps
    if isinstance(norm, nn.SyncBatchNorm) and options.spec.batch_statistics:
        arguments["norm_batch"] = options.norm_batch or "global"
    # an instance norm has no running statistics by default; a batch norm in its place has them
    is_instance_norm = isinstance(norm, nn.modules.instancenorm._InstanceNorm)
    try:
        layer = NormAct2d(
            channels,
            **arguments,
            act_layer=activation,
            apply_act=activation is not None,
            momentum=getattr(norm, "momentum", 0.1),
            device=like.device,
            dtype=like.dtype,
            track_running_stats=is_instance_norm or getattr(norm, "track_running_stats", True),
        )
    except ValueError as error:
        raise ValueError(f"cannot convert {name}: {error}") from error
    _carry_over(norm, layer)
    if layer.proxied and not (layer.weight.is_meta or layer.weight.any()):
        # with γ = 0, the proxy's variance would be 0
        ones = torch.ones_like(layer.weight)
        layer.weight = nn.Parameter(ones, requires_grad=layer.weight.requires_grad)
    return layer.train(norm.training)


def _carry_over(norm: Any, layer: NormAct2d) -> None:
    """Take over γ, β, γ̃, β̃, the running statistics (in float32 or better), and drop."""
    for name, _ in list(layer.named_parameters(recurse=False)):
        old = getattr(norm, name, None)
        if isinstance(old, nn.Parameter):
            setattr(layer, name, old)  # not copied: several norms may share it
        elif old is not None:  # a buffer: the affine of a frozen batch norm becomes trainable
            setattr(layer, name, nn.Parameter(old.detach().clone()))
    for name, buffer in layer.named_buffers(recurse=False):
        old = getattr(norm, name, None)
        like = layer.weight if old is None else old
        if like is not None and buffer.is_floating_point():
            buffer.data = buffer.to(torch.promote_types(like.dtype, buffer.dtype))
        if old is not None:
            buffer.copy_(old)
    if isinstance(getattr(norm, "drop", None), nn.Module):
        layer.drop = norm.drop
