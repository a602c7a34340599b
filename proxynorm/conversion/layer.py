"""Make the NormAct2d that takes a norm's place, with all that the norm had."""

from __future__ import annotations

import copy

import torch
from torch import nn

from proxynorm.conversion.kinds import is_frozen_batch_norm, recognized
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.options import NormOptions


def make_layer(
    name: str,
    norm: nn.Module,
    activation: nn.Module | None,
    options: NormOptions,
    ties: dict[nn.Parameter, nn.Parameter],
) -> NormAct2d:
    """The new layer, with the old one's parameters, statistics, ε, momentum, device, dtype and
    mode.

    ties: what became of the old norms' parameters; those that several norms share stay shared.
    """
    statistics = (getattr(norm, "weight", None), getattr(norm, "running_mean", None))
    like = next((t for t in statistics if t is not None), torch.empty(0))
    is_sync = isinstance(norm, nn.SyncBatchNorm) and options.spec.batch_statistics
    is_sync = is_sync and options.norm_batch is None
    act = None if activation is None else recognized(_own(activation))
    if hasattr(act, "inplace"):
        act.inplace = False
    try:
        layer = NormAct2d(
            _channels(norm),
            **{
                **options.layer_arguments(),
                "eps": norm.eps if options.eps is None else options.eps,
                "norm_batch": "global" if is_sync else options.norm_batch,
            },
            act_layer=act,
            apply_act=act is not None,
            momentum=getattr(norm, "momentum", 0.1),
            device=like.device,
            dtype=like.dtype,
            track_running_stats=_is_tracked(norm),
        )
    except ValueError as error:
        raise ValueError(f"cannot convert {name}: {error}") from error
    _carry_over(norm, layer, ties)
    if layer.proxied and _is_zero(layer.weight):
        nn.init.ones_(layer.weight)  # a zero-initialised γ would leave PN a variance of 0
    return layer.train(norm.training)


def _channels(norm: nn.Module) -> int:
    if hasattr(norm, "num_features"):
        return norm.num_features
    if is_frozen_batch_norm(norm):
        return len(norm.weight)
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[0]


def _is_tracked(norm: nn.Module) -> bool:
    """Whether the new bn tracks running statistics.

    Instance norm without any says nothing about it.
    """
    is_instance_norm = isinstance(norm, nn.modules.instancenorm._InstanceNorm)
    return is_instance_norm or getattr(norm, "track_running_stats", True)


def _own(activation: nn.Module) -> nn.Module:
    """A copy of the activation.

    One with parameters itself, so that those which several norms share stay shared.
    """
    has_parameters = next(activation.parameters(), None) is not None
    return activation if has_parameters else copy.deepcopy(activation)


def _is_zero(tensor: torch.Tensor) -> bool:
    """Whether all values are zero; False where there are none to see (meta and fake tensors)."""
    try:
        return not bool(tensor.any())
    except RuntimeError:
        return False


def _carry_over(norm: nn.Module, layer: NormAct2d, ties: dict[nn.Parameter, nn.Parameter]) -> None:
    """Copy what both have: γ, β, γ̃, β̃ and running statistics (float32 or better).

    And the old layer's drop.
    """
    for name, new in list(layer.named_parameters(recurse=False)):
        old = getattr(norm, name, None)
        if isinstance(old, nn.Parameter) and ties.setdefault(old, new) is not new:
            setattr(layer, name, ties[old])
        elif old is not None:
            new.detach().copy_(old.detach())
            # the affine of a frozen batch norm is a buffer; it learns again
            new.requires_grad_(old.requires_grad or not isinstance(old, nn.Parameter))
    for name, new in layer.named_buffers(recurse=False):
        old = getattr(norm, name, None)
        like = layer.weight if old is None else old
        if like is not None:
            new.data = new.to(torch.promote_types(like.dtype, new.dtype))
        if old is not None:
            new.copy_(old)
    if isinstance(getattr(norm, "drop", None), nn.Module):
        layer.drop = norm.drop
