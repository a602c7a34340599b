"""Makes the NormAct2d that takes a norm's place, with all that the norm had."""

from __future__ import annotations

import copy

import torch
from torch import nn

from proxynorm.conversion.elementwise import recognized
from proxynorm.conversion.places import Place, hand_on_copy
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.options import NormOptions


def make_layer(
    name: str, place: Place, options: NormOptions, ties: dict[nn.Parameter, nn.Parameter]
) -> NormAct2d:
    """The new layer, with the old one's parameters, statistics, ε, momentum, device, dtype and mode.

    ties: what became of the old norms' parameters; those that several norms share stay shared.
    """
    norm = place.norm
    features = norm.num_features if hasattr(norm, "num_features") else _channels(norm)
    like = next(
        (t for t in (norm.weight, getattr(norm, "running_mean", None)) if t is not None),
        torch.empty(0),
    )
    act = None if place.activation is None else recognized(_own(place.activation))
    if hasattr(act, "inplace"):
        act.inplace = False
    try:
        layer = NormAct2d(
            features,
            **{
                **options.layer_arguments(),
                "eps": norm.eps if options.eps is None else options.eps,
            },
            act_layer=act,
            apply_act=act is not None,
            momentum=getattr(norm, "momentum", 0.1),
            device=like.device,
            dtype=like.dtype,
            track_running_stats=getattr(norm, "track_running_stats", True),
        )
    except ValueError as error:
        raise ValueError(f"cannot convert {name}: {error}") from error
    _carry_over(norm, layer, ties)
    if layer.proxied and _is_zero(layer.weight):
        nn.init.ones_(layer.weight)  # a zero-initialised γ would leave PN a variance of 0
    if layer.proxied and place.overwritten:
        layer.register_forward_hook(hand_on_copy)
    return layer.train(norm.training)


def _own(activation: nn.Module) -> nn.Module:
    """A copy of the activation; one with parameters itself, so that those that several norms share stay shared."""
    return (
        activation if next(activation.parameters(), None) is not None else copy.deepcopy(activation)
    )


def _is_zero(tensor: torch.Tensor) -> bool:
    """Whether all values are zero; False where there are none to see (meta and fake tensors)."""
    try:
        return not bool(tensor.any())
    except RuntimeError:
        return False


def _channels(norm: nn.Module) -> int:
    """Channels of a group norm or a layer norm."""
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[0]


def _carry_over(norm: nn.Module, layer: NormAct2d, ties: dict[nn.Parameter, nn.Parameter]) -> None:
    """Copies what both have: γ, β, γ̃, β̃ and running statistics (float32 or better); and the old layer's drop."""
    for name, new in list(layer.named_parameters(recurse=False)):
        old = getattr(norm, name, None)
        if isinstance(old, nn.Parameter) and ties.setdefault(old, new) is not new:
            setattr(layer, name, ties[old])
        elif old is not None:
            new.detach().copy_(old.detach())
            new.requires_grad_(old.requires_grad)
    for name, new in layer.named_buffers(recurse=False):
        old = getattr(norm, name, None)
        like = layer.weight if old is None else old
        new.data = new.to(torch.promote_types(like.dtype, new.dtype))
        if old is not None:
            new.copy_(old)
    if isinstance(getattr(norm, "drop", None), nn.Module):
        layer.drop = norm.drop
