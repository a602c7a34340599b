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
        z = layer.act(layer.norm_affine(x.to(wide), scale, shift))
        # One value per image and channel: the gradients of gain and offset are then sums over the
        # same cells as the norm's, which a compiler takes in one pass.
        *gain, offset = (t.expand(x.shape[:2])[..., None, None] for t in head)
        return ((z * gain[0] if gain else z) + offset).to(x.dtype)


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
            scale, shift, offset = folded
            gain = None
            # Half precision rounds values just above the floor onto it, which the mask of the
            # backward pass would miss: there the general Function rebuilds u, near 0 and exact.
            if x.dtype == offset.dtype:
                shift = shift + offset.detach()
                recipe = _recipe(norm, floored_relu_, x, scale, shift, offset)
                return FlooredReLU.apply(layer.norm_affine(x, scale, shift, norm), offset, recipe)
        else:
            scale, shift, gain, offset = folded
            gain = gain if layer.proxy_scale else None  # a gain of 1 would cost passes over the map
        recipe = _recipe(
            norm, partial(gained_activation_, head=head), x, scale, shift, gain, offset
        )
        u = layer.norm_affine(x, scale, shift, norm)
        return GainedActivation.apply(u, gain, offset, x, scale, shift, head, norm, recipe)


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
