"""The two fast paths of a NormAct2d's forward pass, on the constants of folding.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from proxynorm.nn.fast.folding import fold_reference
from proxynorm.nn.fast.fused import (
    FlooredReLU,
    GainedActivation,
    Head,
    floored_relu_,
    gained_activation_,
    per_channel,
)
from proxynorm.nn.fast.one_step import GroupNormAct, Step, takes_one_step
from proxynorm.nn.fast.precision import without_autocast
from proxynorm.nn.fast.recompute import Recipe, is_recomputing
from proxynorm.nn.norms import group_normalize

if TYPE_CHECKING:
    from proxynorm.nn.norm_act import NormAct2d


def traceable(layer: NormAct2d, x: Tensor) -> Tensor:
    """The folded step in plain operations, for torch.compile, tracing and torch.func."""
    with without_autocast(x.device):
        constants = fold_reference(layer.four_parameters(), layer.proxy_rule())
        wide = torch.promote_types(x.dtype, constants[0].dtype)
        scale, shift, *head = (
            t.to(wide) for t in (constants if layer.proxy_scale else constants[:-1])
        )
        # The norm takes the affine: its bare output is a view, which inductor fails to keep
        # where sizes are symbolic.
        z = layer.act(layer.norm_affine(x.to(wide), scale, shift))
        gain, offset = (
            (per_channel(t) for t in head) if len(head) == 2 else (None, per_channel(*head))
        )
        return ((z if gain is None else z * gain) + offset).to(x.dtype)


def fused(layer: NormAct2d, x: Tensor) -> Tensor:
    """The folded step with hand-written backward passes; see fused.py and one_step.py."""
    head, constants = Head(layer.act_name, layer.act), layer.constants()
    if layer.spec.normalize is group_normalize and takes_one_step(x, constants):
        step = Step(head, layer.proxy_rule(), layer.groups, layer.eps)
        with without_autocast(x.device):
            return GroupNormAct.apply(
                x, *layer.four_parameters(), constants, step, is_recomputing()
            )
    folded = layer.folded_constants(constants)
    folded = folded if layer.proxy_scale else folded[:-1]
    norm = layer.bound_norm()
    with without_autocast(x.device):
        if head.name == "relu":
            scale, shift, floor = folded
            shift = shift + floor.detach()
            recipe = _recipe(norm, floored_relu_, x, scale, shift, floor)
            return FlooredReLU.apply(layer.norm_affine(x, scale, shift, norm), floor, recipe)
        scale, shift, gain, offset = folded
        gain = gain if layer.proxy_scale else None  # a gain of 1 would cost passes over the map
        recipe = _recipe(
            norm, partial(gained_activation_, head=head), x, scale, shift, gain, offset
        )
        return GainedActivation.apply(
            layer.norm_affine(x, scale, shift, norm),
            gain,
            offset,
            x,
            scale,
            shift,
            head,
            norm,
            recipe,
        )


def _recipe(
    norm: Callable[..., Tensor],
    head: Callable[..., Tensor],
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *constants: Tensor | None,
) -> Callable[[Tensor], None] | None:
    """How recompute.py rebuilds the output, head(norm(x)); None where nothing is recomputed."""
    if not is_recomputing() or not any(
        t is not None and t.requires_grad for t in (x, scale, shift, *constants)
    ):
        return None
    scale, shift, *constants = (t if t is None else t.detach() for t in (scale, shift, *constants))
    return Recipe(lambda x: head(norm(x, weight=scale, bias=shift), *constants), x).watch
