"""Shared moments: one vectorized evaluation for all layers, and only after parameters changed.

Each forward pass of the network compares the values of the parameters with those of the last
evaluation, so the constants are never stale. One evaluation serves all micro-batches of an update,
or a whole validation. Parameters are compared on CPUs only: on other devices the comparison would
wait for the device, so each forward pass evaluates the moments again. The layers drop the constants
when the network's forward pass ends. In an inner module that is called alone, each layer evaluates
its own. If Ctrl-C ends a forward pass before the constants are dropped, a layer recognizes outdated
ones by its options and the versions of its parameters.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from proxynorm.nn.fast.folding import Constants, evaluate_constants
from proxynorm.nn.fast.precision import needs_plain_operations
from proxynorm.nn.norm_act import NormAct2d


def share_moments(model: nn.Module) -> nn.Module:
    """Make model evaluate the moments of all its NormAct2d layers together; return the model.

    Results are equal up to rounding. A second call has no effect. Under torch.compile, torch.func
    and tracing, every layer evaluates its own moments.
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
        """Pre-forward hook: give every layer its constants."""
        if needs_plain_operations():
            return
        families: dict[Hashable, list[NormAct2d]] = {}
        for module in model.modules():
            if isinstance(module, NormAct2d) and module.folds and _is_plain(module):
                families.setdefault(_family(module), []).append(module)
        last, self.evaluated = self.evaluated, {}
        for family, layers in families.items():
            self._serve(layers, family, last.get(family))

    def _serve(
        self, layers: list[NormAct2d], family: Hashable, evaluated: tuple[Tensor, Constants] | None
    ) -> None:
        """Give the layers of a family their constants; evaluated: the last evaluation, if any."""
        # Constants that are evaluated in inference mode may be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            columns = zip(*(layer.four_parameters() for layer in layers))
            parameters = torch.stack([torch.cat(column) for column in columns])
            # Fake tensors have no values, so they are neither compared nor stored.
            comparable = type(parameters) is Tensor and parameters.device.type == "cpu"
            if evaluated is None or not comparable or not torch.equal(evaluated[0], parameters):
                constants = evaluate_constants(parameters.unbind(), layers[0].proxy_rule())
                evaluated = parameters, constants
            if comparable:
                self.evaluated[family] = evaluated
            sizes = [layer.num_features for layer in layers]
            parts = zip(*(rows.split(sizes, dim=-1) for rows in evaluated[1]))
        for layer, part in zip(layers, parts):
            layer.share_constants(Constants(*part))
        self.served += layers

    def withdraw(self, model: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        """Forward hook, called after an error too: take the constants away from the layers."""
        if needs_plain_operations():
            return
        for layer in self.served:
            layer.shared_constants = None
        self.served = []


def _is_plain(layer: NormAct2d) -> bool:
    """True if the parameters are plain tensors.

    Sharded ones (DTensor) cannot be concatenated. Changes of parametrized ones go unnoticed, and
    pre-hooks (pruning) compute theirs only when the layer is called.
    """
    is_computed = parametrize.is_parametrized(layer) or layer._forward_pre_hooks
    return not is_computed and all(
        type(p) in (Tensor, nn.Parameter) for p in layer.four_parameters()
    )


def _family(layer: NormAct2d) -> Hashable:
    """A key that layers share if they have the same rule and can be evaluated together."""
    act, *options = layer.proxy_rule()
    weight = layer.proxy_weight
    # extra_repr has an activation's arguments, such as LeakyReLU's slope.
    return type(act), act.extra_repr(), *options, weight.device, weight.dtype
