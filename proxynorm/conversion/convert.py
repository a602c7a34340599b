"""Convert an existing network to NormAct2d: observe, match, replace, verify.

Copies of the network run on example inputs and show which activation follows each norm. The same
changes, made with the original norms and without PN, must then reproduce the network's outputs bit
for bit. The network itself is changed only after that, so a refused conversion leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from proxynorm.conversion.kinds import is_norm, is_other_norm, kind_of, own_activation
from proxynorm.conversion.layer import make_layer
from proxynorm.conversion.match import Plan, make_plan
from proxynorm.conversion.observe import Observation, observe
from proxynorm.conversion.rewrite import rewritten_class
from proxynorm.conversion.run import (
    Forward,
    first_tensor,
    preserved_randomness,
    separate_shared_activations,
)
from proxynorm.conversion.verify import StandIn, check_per_sample, check_same
from proxynorm.nn.fast.shared import share_moments
from proxynorm.nn.freeze import clone_output, replace_modules
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.options import NormOptions
from proxynorm.nn.weights import standardize_weights


class ConversionRow(NamedTuple):
    """The action that convert took on one module."""

    module: str  # its qualified name
    kind: str  # its class before the conversion
    action: str  # the replacement, or why it was left as it is


class ConversionReport(list[ConversionRow]):
    """A list of ConversionRow that prints as an aligned table."""

    def __str__(self) -> str:
        rows = [ConversionRow._fields, *self]
        first, second = (max(len(row[i]) for row in rows) for i in range(2))
        return "\n".join(f"{m:<{first}}  {kind:<{second}}  {action}" for m, kind, action in rows)


@torch.inference_mode(False)  # new parameters must be trainable
def convert(
    model: nn.Module,
    norm: str = "ln_pn",
    example_inputs: object = None,
    keep: Iterable[str] = (),
    no_activation: Iterable[str] = (),
    *,
    groups: int | None = NormOptions.groups,
    norm_batch: int | str | None = NormOptions.norm_batch,
    eps: float | None = NormOptions.eps,
    proxy_eps: float = NormOptions.proxy_eps,
    moments: str = NormOptions.moments,
    nodes: int = NormOptions.nodes,
    verify: bool = True,
) -> nn.Module:
    """Replace, in place, every norm of a network and the activation that follows it by NormAct2d.

    Batch, group, instance and frozen batch norms are always replaced, channels-first layer norms
    only if an activation follows. A norm without an activation after it gets no PN; if norm has PN,
    it keeps its scale and loses its shift (the authors' rule). Weights, γ, β and running statistics
    are carried over, and other weights keep their keys, unless they are standardized (ws). An
    activation written out in a forward (x * torch.sigmoid(x)) is refused. γ̃ and β̃ are new: create
    the optimizer after the conversion.

    Args:
        model: a network whose norms act on maps (N, C, H, W). Copies of it are run.
        norm: one of proxynorm.nn.NORMS.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a function
            that calls the model, once for each branch of its forward (for a detector, with targets
            in training). None: random images of several sizes are tried.
        keep: names of norms to leave as they are, or patterns of such names ("stages.0.*").
        no_activation: names or patterns of norms to convert as if no activation followed them.
        groups, norm_batch, eps, proxy_eps, moments, nodes: see proxynorm.nn.options.NormOptions.
        verify: compare outputs before the model is changed.

    Returns:
        The same model. proxynorm.conversion_report(model) lists what was done.

    Raises:
        TypeError: model is not a module, or keep or no_activation is a string.
        ValueError, with the model left as it was: an option is invalid, the network does not run,
            nothing can be converted, norms cannot be placed (all are named), or outputs differ.
    """
    _check_network(model)
    options = NormOptions(norm, groups, eps, proxy_eps, norm_batch, moments, nodes)
    with preserved_randomness():
        forward, seen = observe(model, example_inputs)
        plan = make_plan(model, seen, keep, no_activation, options.spec.proxy)
        if verify:
            _verify(model, forward, seen, plan, options)
    layers = _layers(model, plan, options)
    separate_shared_activations(model)
    rows = _report(model, plan, layers)
    _apply(model, plan, layers)
    if options.spec.weight_standardization:
        for name in sorted(seen.feeding):
            standardize_weights(model.get_submodule(name))
    if options.spec.proxy:
        share_moments(model)
    vars(model)["conversion_rows"] = rows  # nn.Module's __setattr__ is typed for tensors, modules
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """A row for each module that convert changed and each norm that it left. Prints as a table.

    Raises:
        ValueError: the model was not converted.
    """
    rows: ConversionReport | None = getattr(model, "conversion_rows", None)
    if rows is None:
        raise ValueError(
            f"this {type(model).__name__} was not converted: call proxynorm.convert(model) first"
        )
    return rows


def _check_network(model: nn.Module) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert takes a network, an nn.Module, not {model!r}: create it first, for example "
            "with timm.create_model"
        )
    if is_norm(model):
        raise ValueError(
            f"cannot convert this {kind} in place, since it is a norm itself: put it into an "
            "nn.Sequential"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"cannot convert this {kind}: {name or 'it'} is scripted, traced or compiled: "
                "convert the network before torch.jit or torch.compile"
            )
        # A copy would still call this forward, which belongs to the original.
        if "forward" in vars(module) and (kind_of(module) or [*module.children()]):
            raise ValueError(
                f"cannot convert this {kind}: a forward was set on the object "
                f"{name or 'the model itself'}, which may compute something else than its class: "
                "convert before setting it, or move it into a class"
            )


def _verify(
    model: nn.Module, forward: Forward, seen: Observation, plan: Plan, options: NormOptions
) -> None:
    """Raise ValueError unless converted copies behave like the original."""
    sites = ", ".join(sorted({str(site) for site in plan.sites}))
    advice = "Leave the norms around it as they are with keep=[...]"
    if sites:
        advice += f", or make the activations called at {sites} modules of their own"
    check_same(model, forward, lambda copied: _apply(copied, plan, _layers(copied, plan)), advice)
    if not options.spec.batch_statistics and "training" not in seen.errors:
        check_per_sample(
            model, forward, lambda copied: _apply(copied, plan, _layers(copied, plan, options))
        )


def _layers(
    model: nn.Module, plan: Plan, options: NormOptions | None = None
) -> dict[str, nn.Module]:
    """The new layers, by norm name. The model is not changed.

    Without options, each new layer is the original norm with the modules that followed it.
    """
    layers: dict[str, nn.Module] = {}
    for name, call in plan.norms.items():
        norm = model.get_submodule(name)
        own = own_activation(norm)
        following = call.activation if call.name is None else model.get_submodule(call.name)
        activation = following if own is None else own
        between = [model.get_submodule(inner) for inner in call.between]
        if options is None:
            after = [activation] if own is None and activation is not None else []
            layers[name] = StandIn(norm, *between, *after)
            continue
        channels, default = call.value.shape[1], first_tensor(model)
        layer = make_layer(name, norm, channels, activation, options, default)
        if between:
            layer.drop = between[0] if len(between) == 1 else nn.Sequential(*between)
        if layer.proxied and name in plan.overwritten:
            layer.register_forward_hook(clone_output)
        layers[name] = layer
    return layers


def _apply(model: nn.Module, plan: Plan, layers: dict[str, nn.Module]) -> None:
    """Make the plan's changes in place, with the given layers in place of the norms."""
    inside = [name for call in plan.norms.values() for name in call.between]
    replacements: dict[nn.Module, nn.Module] = {}
    for name in (*inside, *plan.identities):
        module = model.get_submodule(name)
        replacements[module] = nn.Identity().train(module.training)
    replacements |= {model.get_submodule(name): layer for name, layer in layers.items()}
    replace_modules(model, replacements)
    for name, edits in plan.edits.items():
        module = model.get_submodule(name)
        kind: Any = type(module)
        module.__class__ = rewritten_class(kind, edits)


def _report(model: nn.Module, plan: Plan, layers: dict[str, nn.Module]) -> ConversionReport:
    """The report, in the network's order. Made before the plan is applied."""
    actions = {name: f"left as it is: {why}" for name, why in plan.left.items()}
    for owner in plan.edits:
        count = sum(site.owner == owner for site in plan.sites)
        calls = "1 activation call" if count == 1 else f"{count} activation calls"
        actions[owner] = f"{calls} of its forward joined with norms"
    actions |= {name: _describe(model.get_submodule(name), layers[name]) for name in layers}
    identities = {model.get_submodule(name) for name in plan.identities}
    rows = ConversionReport()
    for name, module in model.named_modules(remove_duplicate=False):
        action = actions.get(name)
        if module in identities:
            action = "joined with its norm; replaced by the identity"
        elif action is None and is_other_norm(module):
            action = "left as it is: not a norm over maps (N, C, H, W)"
        if action is not None:
            rows.append(ConversionRow(name, type(module).__name__, action))
    return rows


def _describe(norm: nn.Module, layer: nn.Module) -> str:
    """The action of a norm's row."""
    assert isinstance(layer, NormAct2d)
    kind = layer.kind.upper()
    if not layer.apply_act:
        dropped = layer.bias is None and getattr(norm, "bias", None) is not None
        return f"{kind}, no activation behind it{': scale kept, shift dropped' if dropped else ''}"
    inside = type(layer.drop).__name__
    inside = f" with {inside} inside" if inside != "Identity" else ""
    copied = ", output copied because it is changed in place" if layer._forward_hooks else ""
    # a FunctionActivation is listed by the type of its function
    activation = type(getattr(layer.act, "function", layer.act)).__name__
    return f"{kind} + {activation}{' + PN' if layer.proxy else ''}{inside}{copied}"
