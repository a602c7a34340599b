"""The moments of all layers of a network in one vectorised evaluation per forward pass.

The constants are made when the network's forward begins and dropped when it ends. They are therefore never stale,
however the parameters were changed in between, and a forward of some inner module alone simply makes its own. Only a
parameter that the network's own forward edits, after this module's hook has run, is seen by the next forward first.
"""
from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn

from .folding import Constants, fold
from .fused import is_transformed
from .norm_act import NormAct2d


def share_moments(model: nn.Module) -> nn.Module:
    """Makes model evaluate the moments of all its NormAct2d layers together, once per forward; returns the model.

    Purely a matter of speed: results are the same to rounding. Safe to call twice. Under torch.compile, torch.func and
    tracing every layer evaluates its own.
    """
    if _fold_all not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_fold_all)
        model.register_forward_hook(_drop_all, always_call=True)
    return model


def _fold_all(model: nn.Module, inputs: tuple) -> None:
    if is_transformed():
        return
    families: dict[Hashable, list[NormAct2d]] = {}
    for module in model.modules():
        if isinstance(module, NormAct2d) and module.proxied and module.act_name != "callable":
            families.setdefault(_family(module), []).append(module)
    for layers in families.values():
        if len(layers) > 1:
            _fold_family(layers)


def _family(layer: NormAct2d) -> Hashable:
    """Layers of one family have moments by the same rule, and parameters that can stand side by side."""
    weight = layer.proxy_weight
    return (layer.act_name, layer.act.extra_repr(), layer.moments, layer.nodes, layer.proxy_eps, layer.proxy_scale,
            weight.device, weight.dtype)


def _fold_family(layers: list[NormAct2d]) -> None:
    with torch.no_grad():
        parameters = tuple(torch.cat(column) for column in zip(*(layer.four_parameters() for layer in layers)))
    values, jacobian = fold(parameters, layers[0].proxy_rule())
    sizes = [layer.num_features for layer in layers]
    for layer, *constants in zip(layers, values.split(sizes, dim=-1), jacobian.split(sizes, dim=-1)):
        layer.shared_constants = Constants(*constants)


def _drop_all(model: nn.Module, inputs: tuple, output: object) -> None:
    if is_transformed():
        return
    for module in model.modules():
        if isinstance(module, NormAct2d):
            module.shared_constants = None
