"""Put NormAct2d into a network that exists: observe, match, replace, verify.

The network runs on example inputs, a copy at a time, and shows which activation follows each norm.
The same changes, made with the original norms and no PN, must then reproduce the network's outputs
bit for bit. Only after that is the network itself changed, so that a refused conversion leaves it
as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from proxynorm.conversion.kinds import is_other_norm, kind_of, own_activation
from proxynorm.conversion.layer import make_layer
from proxynorm.conversion.match import Plan, make_plan
from proxynorm.conversion.observe import Observation, observe
from proxynorm.conversion.rewrite import rewritten_class
from proxynorm.conversion.run import Run, preserved_randomness, separate_shared_activations
from proxynorm.conversion.verify import StandIn, check_per_sample, check_same
from proxynorm.nn.fast.shared import share_moments
from proxynorm.nn.freeze import hand_on_copy, replace_modules
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.options import NormOptions
from proxynorm.nn.weights import standardize_weights


class ConversionRow(NamedTuple):
    """The action that convert took on one module."""

    module: str  # its qualified name
    kind: str  # its class before the conversion
    action: str  # what became of it, or why it was left


class ConversionReport(list[ConversionRow]):
    """A list of ConversionRow that prints as an aligned table."""

    def __str__(self) -> str:
        rows = [ConversionRow._fields, *self]
        first, second = (max(len(row[i]) for row in rows) for i in range(2))
        return "\n".join(f"{m:<{first}}  {kind:<{second}}  {action}" for m, kind, action in rows)


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

    Batch, group, instance and frozen batch norms are replaced wherever they stand, channels-first
    layer norms only where an activation follows. A norm without an activation gets no PN; with PN
    on it keeps its scale and drops its shift (the authors' rule). Weights, γ, β and running
    statistics are carried over, and the keys of all other weights stay. An activation written out
    in a forward (x * torch.sigmoid(x)) is refused. γ̃ and β̃ are new: make the optimizer afterwards.

    Args:
        model: a network for maps (N, C, H, W); copies of it are run.
        norm: one of proxynorm.nn.NORMS.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a function
            that calls the model it is given (a detector's needs targets in training). None: random
            images of several sizes are tried.
        keep: names of norms to leave as they are, or patterns of such names ("stages.0.*").
        no_activation: the same for norms to convert as followed by no activation, whatever follows.
        groups, norm_batch, eps, proxy_eps, moments, nodes: see proxynorm.nn.options.NormOptions.
        verify: compare outputs before anything is changed; create_model skips what tests cover.

    Returns:
        The same model. proxynorm.conversion_report(model) tells what was done.

    Raises:
        TypeError: model is no module, or keep or no_activation a string.
        ValueError, the model left as it was: a wrong option, a network that does not run, nothing
            to convert, norms that cannot be placed (all named, with reasons), other outputs.
    """
    _check_network(model)
    options = NormOptions(norm, groups, eps, proxy_eps, norm_batch, moments, nodes)
    with preserved_randomness():
        call, seen = observe(model, example_inputs)
        plan = make_plan(model, seen, keep, no_activation, options.spec.proxy)
        if verify:
            _verify(model, call, seen, plan, options)
    layers = _layers(model, plan, options)
    separate_shared_activations(model)
    rows = _report(model, plan, layers)
    _apply(model, plan, layers)
    if options.spec.weight_standardization:
        for name in sorted(seen.feeding):
            standardize_weights(model.get_submodule(name))
    if options.spec.proxy:
        share_moments(model)
    vars(model)["conversion_rows"] = rows  # no module, no parameter: nn.Module need not look
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """A row for each module that convert changed and each norm that it left; prints as a table.

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
            f"convert takes a network, an nn.Module, not {model!r}: make it first, with "
            "timm.create_model"
        )
    # a copy would run the forward of the original, whatever is done to the copy
    for name, module in model.named_modules():
        if "forward" in vars(module) and (kind_of(module) or [*module.children()]):
            raise ValueError(
                f"cannot convert this {kind}: a forward was set on the object "
                f"{name or 'the model itself'}, which may compute something else than its class: "
                "convert before setting it, or put it into a class"
            )


def _verify(
    model: nn.Module, call: Run, seen: Observation, plan: Plan, options: NormOptions
) -> None:
    """Raise ValueError unless copies show that the plan may be carried out."""
    sites = ", ".join(sorted({str(site) for site in plan.sites}))
    advice = "Leave the norms around it as they are with keep=[...]"
    if sites:
        advice += f", or make the activations called at {sites} modules of their own"
    check_same(model, call, lambda copied: _apply(copied, plan, _layers(copied, plan)), advice)
    if not options.spec.batch_statistics and "training" not in seen.errors:
        check_per_sample(
            model, call, lambda copied: _apply(copied, plan, _layers(copied, plan, options))
        )


def _layers(
    model: nn.Module, plan: Plan, options: NormOptions | None = None
) -> dict[str, nn.Module]:
    """The new layers, by the names of the norms; the model is not changed.

    Without options, the original norms, each with what followed it.
    """
    layers: dict[str, nn.Module] = {}
    for name, call in plan.norms.items():
        norm = model.get_submodule(name)
        own = own_activation(norm)
        behind = call.activation if call.name is None else model.get_submodule(call.name)
        activation = behind if own is None else own
        between = [model.get_submodule(inner) for inner in call.between]
        if options is None:
            follows = [activation] if own is None and activation is not None else []
            layers[name] = StandIn(norm, *between, *follows)
            continue
        layer = make_layer(name, norm, call.value.shape[1], activation, options)
        if between:
            layer.drop = between[0] if len(between) == 1 else nn.Sequential(*between)
        if layer.proxied and name in plan.overwritten:
            layer.register_forward_hook(hand_on_copy)
        layers[name] = layer
    return layers


def _apply(model: nn.Module, plan: Plan, layers: dict[str, nn.Module]) -> None:
    """Make the plan's changes in place, with the given layers for the norms."""
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
    """List what the plan does with each module, in the network's order; made before it is done."""
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
            action = "joined with its norm; the identity stands here"
        elif action is None and is_other_norm(module):
            action = "left as it is: no norm over maps (N, C, H, W)"
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
    copied = ", a copy of it handed on, as it is changed in place" if layer._forward_hooks else ""
    # a wrapper of a function goes by the function's name
    activation = type(getattr(layer.act, "function", layer.act)).__name__
    return f"{kind} + {activation}{' + PN' if layer.proxy else ''}{inside}{copied}"
