"""Shared moments: one vectorised evaluation for all layers, only when parameters change.

Each forward pass of the network compares the parameters with those of the last evaluation, by
value, so the constants are never stale. One evaluation serves all micro-batches of an update and a
whole validation. The comparison is for CPUs: elsewhere it would wait for the device, so each
forward pass evaluates. The layers drop the constants when the network's forward pass ends; an inner
module that is called alone makes its own. If Ctrl-C ended the forward pass before its hook, a layer
sees by its options and its parameters' versions that shared constants are outdated.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from proxynorm.nn.fast.folding import Constants, fold
from proxynorm.nn.fast.precision import is_transformed
from proxynorm.nn.norm_act import NormAct2d


def share_moments(model: nn.Module) -> nn.Module:
    """Make model evaluate the moments of all its NormAct2d layers together; return the model.

    Results are the same to rounding. Safe to call twice. Under torch.compile, torch.func and
    tracing every layer evaluates its own.
    """
    if not any(
        getattr(hook, "__func__", None) is SharedMoments.distribute
        for hook in model._forward_pre_hooks.values()
    ):
        shared = SharedMoments()
        model.register_forward_pre_hook(shared.distribute)
        model.register_forward_hook(shared.withdraw, always_call=True)
    return model


class SharedMoments:
    """The hooks of one network, and its last evaluation: parameters (4, C) and constants."""

    def __init__(self) -> None:
        self.evaluated: dict[Hashable, tuple[Tensor, Constants]] = {}
        self.served: list[NormAct2d] = []

    def distribute(self, model: nn.Module, inputs: tuple[object, ...]) -> None:
        """Before the forward: gives every layer its constants."""
        if is_transformed():
            return
        families: dict[Hashable, list[NormAct2d]] = {}
        for module in model.modules():
            if isinstance(module, NormAct2d) and module.folds and _is_plain(module):
                families.setdefault(_family(module), []).append(module)
        before, self.evaluated = self.evaluated, {}
        for family, layers in families.items():
            self._serve(layers, family, before.get(family))

    def _serve(
        self, layers: list[NormAct2d], family: Hashable, before: tuple[Tensor, Constants] | None
    ) -> None:
        # a training forward may meet what an evaluation in inference mode leaves here
        with torch.inference_mode(False), torch.no_grad():
            columns = zip(*(layer.four_parameters() for layer in layers))
            parameters = torch.stack([torch.cat(column) for column in columns])
            # under FakeTensorMode what is evaluated has no values: it is neither compared nor kept
            comparable = type(parameters) is Tensor and parameters.device.type == "cpu"
            if before is None or not comparable or not torch.equal(before[0], parameters):
                before = parameters, fold(parameters.unbind(), layers[0].proxy_rule())
            if comparable:
                self.evaluated[family] = before
            sizes = [layer.num_features for layer in layers]
            parts = zip(*(rows.split(sizes, dim=-1) for rows in before[1]))
        for layer, constants in zip(layers, parts):
            layer.share_constants(Constants(*constants))
        self.served += layers

    def withdraw(self, model: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        """After the forward, a failed one too: leaves no layer with constants."""
        if is_transformed():
            return
        for layer in self.served:
            layer.shared_constants = None
        self.served = []


def _is_plain(layer: NormAct2d) -> bool:
    """True if the parameters are plain tensors, which can be concatenated.

    Sharded ones (DTensor) cannot, and parametrized ones may change unseen.
    """
    return not parametrize.is_parametrized(layer) and all(
        type(p) in (Tensor, nn.Parameter) for p in layer.four_parameters()
    )


def _family(layer: NormAct2d) -> Hashable:
    """Layers of one family integrate by the same rule, and their parameters can be concatenated."""
    act, *options = layer.proxy_rule()
    weight = layer.proxy_weight
    return type(act), act.extra_repr(), *options, weight.device, weight.dtype
