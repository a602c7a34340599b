"""Puts NormAct2d into any timm or torchvision ConvNet: each norm is joined with the activation behind it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from proxynorm.conversion.dataflow import Flow, read_flow
from proxynorm.conversion.elementwise import has_set_forward, is_activation, is_norm
from proxynorm.conversion.followers import Site
from proxynorm.conversion.places import Place, find_places
from proxynorm.conversion.replacement import make_layer
from proxynorm.conversion.rewrite import RewrittenForward, install_forwards, rewritten_forwards
from proxynorm.nn.fast.shared import share_moments
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.options import NormOptions
from proxynorm.nn.weights import standardize_weights


@dataclass(frozen=True)
class ConversionRow:
    """What convert did with one module.

    Attributes:
        module: its qualified name.
        kind: its class before the conversion.
        action: what became of it.
    """

    module: str
    kind: str
    action: str


class ConversionReport(list):
    """A list of ConversionRow that prints as an aligned table."""

    def __str__(self) -> str:
        rows = [("module", "kind", "action"), *((row.module, row.kind, row.action) for row in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{m:<{widths[0]}}  {k:<{widths[1]}}  {a}" for m, k, a in rows)


def convert(
    model: nn.Module,
    norm: str = "ln_pn",
    *,
    groups: int | None = NormOptions.groups,
    norm_batch: int | str | None = NormOptions.norm_batch,
    eps: float | None = NormOptions.eps,
    proxy_eps: float = NormOptions.proxy_eps,
    moments: str = NormOptions.moments,
    nodes: int = NormOptions.nodes,
    keep: Iterable[str] = (),
) -> nn.Module:
    """Replaces, in place, every norm of a network and the activation that follows it in the data flow by NormAct2d.

    Batch and group norms are replaced wherever they stand, channels-first layer norms only where an activation
    follows. A norm without an activation gets no PN; with PN on it keeps its scale and drops its shift (the
    authors' rule). Weights, γ, β and running statistics are carried over, and the keys of all other
    weights stay. Where an activation cannot be replaced as a module (a function, or one module called at several
    places) its caller's forward is rewritten; see proxynorm.conversion.rewrite. A module of your own counts as an activation
    if it keeps no weights but single numbers and acts on each element alone; one written out in a forward
    (x * torch.sigmoid(x)) is refused, as is whatever else stands between a norm and the next layer, or the sum or
    product with another value, and is not known to be linear (proxynorm.conversion.linear). The new γ and β are new parameters:
    make the optimizer afterwards.

    Args:
        model: a ConvNet for maps (N, C, H, W).
        norm: one of proxynorm.nn.NORMS.
        groups: groups of gn; None: the largest divisor of C up to 32.
        norm_batch: images that share bn's statistics.
        eps: the norm's ε; None keeps each module's own.
        proxy_eps: PN's ε, added to the variance.
        moments: how PN's moments are integrated: auto, exact or grid (the paper's).
        nodes: nodes of the grid.
        keep: qualified names of norms to leave as they are, or patterns of such names ("stages.0.*").

    Returns:
        The same model. proxynorm.conversion_report(model) tells what was done.

    Raises:
        TypeError: model is no module, or keep a string.
        ValueError: a wrong norm or option, nothing to convert, or norms that cannot be placed (all named, with the reasons);
            the model then still computes what it did.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert takes a network, an nn.Module, not {model!r}: make it first, with timm.create_model"
        )
    if is_norm(model):
        raise ValueError(
            f"this {type(model).__name__} is no network but a norm: make a proxynorm.NormAct2d instead"
        )
    if isinstance(keep, str):
        raise TypeError(f"keep is a list of names: keep=[{keep!r}]")
    options = NormOptions(norm, groups, eps, proxy_eps, norm_batch, moments, nodes)
    spec = options.spec
    _refuse_set_forwards(model)
    _separate_shared_activations(model)
    flow = read_flow(model)
    places = find_places(model, flow, set(keep), spec.proxy)
    ties: dict[nn.Parameter, nn.Parameter] = {}
    replacements = {name: make_layer(name, place, options, ties) for name, place in places.items()}
    rows = _absorb_activations(model, flow, places)
    rows += [_install(model, name, place, replacements[name]) for name, place in places.items()]
    if spec.weight_standardization:
        for name in sorted(flow.feeding):
            standardize_weights(model.get_submodule(name))
    if spec.proxy:
        share_moments(model)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    model.conversion_rows = ConversionReport(
        sorted(rows, key=lambda row: order.get(row.module, -1))
    )
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What convert did to this model, a row per module; prints as a table.

    Raises:
        ValueError: the model was not converted.
    """
    rows = getattr(model, "conversion_rows", None)
    if rows is None:
        raise ValueError(
            f"this {type(model).__name__} was not converted: call proxynorm.convert(model) first"
        )
    return rows


def standardize_before_norms(model: nn.Module) -> nn.Module:
    """Weight standardization on the convolutions whose output reaches a norm, alone or in a sum; returns the model."""
    for name in sorted(read_flow(model).feeding):
        standardize_weights(model.get_submodule(name))
    return model


def _refuse_set_forwards(model: nn.Module) -> None:
    """Raises ValueError if a forward was set on an object rather than on its class, where the data flow would not be
    what its class says; a layer of torch's that is neither norm nor activation is looked at as a whole anyway."""
    found = [
        name or "the model itself"
        for name, module in model.named_modules()
        if has_set_forward(module)
        and (
            is_norm(module)
            or is_activation(module)
            or not type(module).__module__.startswith("torch.nn.")
        )
    ]
    if found:
        raise ValueError(
            f"cannot convert this {type(model).__name__}: a forward was set on the object {', '.join(found)}, which may "
            "compute something else than its class: convert before setting it, or put it into a class"
        )


def _separate_shared_activations(model: nn.Module) -> None:
    """Gives each attribute that holds a shared activation without parameters a copy of its own.

    The copies compute the same; each attribute can then be replaced without touching the others.
    """
    seen: set[nn.Module] = set()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if (
                child is None
                or not is_activation(child)
                or next(child.parameters(), None) is not None
            ):
                continue
            if child in seen:
                setattr(parent, name, copy.deepcopy(child))
            seen.add(child)


def _callers_to_rewrite(flow: Flow, absorbed: set[Site]) -> dict[str, list[int]]:
    """The modules whose forward loses calls, by name: those where an absorbed activation is a function, or a module
    that is called elsewhere too. There all absorbed calls go, so that their numbers stay valid."""
    lasting = {site.module for site in flow.sites if site not in absorbed}
    callers: set[str] = set()
    while True:
        more = {s.caller for s in absorbed if s.module is None or s.module in lasting} - callers
        if not more:
            return {
                c: sorted(s.ordinal for s in absorbed if s.caller == c) for c in sorted(callers)
            }
        callers |= more
        lasting |= {site.module for site in absorbed if site.caller in callers}


def _absorb_activations(
    model: nn.Module, flow: Flow, places: dict[str, Place]
) -> list[ConversionRow]:
    """Takes the absorbed activations out: whole modules become the identity, single calls leave their caller.

    Raises ValueError before anything is changed.
    """
    absorbed = {site for place in places.values() for site in place.sites}
    callers = _callers_to_rewrite(flow, absorbed)
    forwards = {}
    for name, calls in callers.items():
        module = model.get_submodule(name)
        if isinstance(module, RewrittenForward):
            raise ValueError(
                f"{name} was rewritten by an earlier conversion: convert the original model"
            )
        _check_rewritable(name, calls, flow, places)
        forwards[name] = rewritten_forwards(module, calls, flow.fixed[name])
    replaced = sorted({site.module for site in absorbed if site.caller not in callers})
    _check_replaceable(set(replaced), flow, places)
    rows = []
    for name, calls in callers.items():
        module = model.get_submodule(name)
        count = f"{len(calls)} activation call{'s' if len(calls) > 1 else ''}"
        rows.append(
            ConversionRow(name, type(module).__name__, f"{count} of its forward joined with norms")
        )
        install_forwards(module, calls, flow.fixed[name], forwards[name])
    for name in replaced:
        module = model.get_submodule(name)
        for alias, other in list(model.named_modules(remove_duplicate=False)):
            if other is module:
                rows.append(
                    ConversionRow(
                        alias,
                        type(module).__name__,
                        "joined with its norm; the identity stands here",
                    )
                )
                model.set_submodule(alias, nn.Identity().train(module.training))
    return rows


def _absorbed_in_evaluation(flow: Flow, places: dict[str, Place]) -> set[Site | None]:
    """The activation calls that follow the placed norms in evaluation."""
    return {found.site for name in places for found in flow.evaluation.followers.get(name, [])}


def _check_rewritable(name: str, calls: list[int], flow: Flow, places: dict[str, Place]) -> None:
    """Raises ValueError if these calls of a forward are others in evaluation, or if it runs with several options."""
    told = name or "the model"
    sites = {site for site in flow.evaluation.sites if site.caller == name}
    if {site for site in sites if site.ordinal in calls} != sites & _absorbed_in_evaluation(
        flow, places
    ):
        raise ValueError(
            f"cannot convert: {told} calls its activations in another order in evaluation than in training. "
            "Make them modules of their own, like nn.SiLU"
        )
    varied = flow.varied | flow.evaluation.varied
    if name in varied or flow.evaluation.fixed.get(name, flow.fixed[name]) != flow.fixed[name]:
        raise ValueError(
            f"cannot convert: {told} is called with several values of its optional arguments "
            f"({', '.join(flow.fixed[name])}), and has activations that are no modules. Make these modules"
        )


def _check_replaceable(activations: set[str | None], flow: Flow, places: dict[str, Place]) -> None:
    """Raises ValueError if an activation's module, about to become the identity, serves other values in evaluation."""
    absorbed = _absorbed_in_evaluation(flow, places)
    for site in flow.evaluation.sites:
        if site.module in activations and site not in absorbed:
            raise ValueError(
                f"cannot convert: in evaluation, the activation {site.module} serves other values too than "
                "those of norms. Use one module for each call"
            )


def _install(model: nn.Module, name: str, place: Place, layer: NormAct2d) -> ConversionRow:
    """Puts the new layer in the old one's place, with what stood between norm and activation inside it."""
    inner = [model.get_submodule(step) for step in place.between]
    if inner:
        layer.drop = inner[0] if len(inner) == 1 else nn.Sequential(*inner)
        for step in place.between:
            model.set_submodule(step, nn.Identity().train(layer.training))
    for alias, module in list(model.named_modules(remove_duplicate=False)):
        if module is place.norm:
            model.set_submodule(alias, layer)
    return ConversionRow(name, type(place.norm).__name__, _describe(place, layer))


def _describe(place: Place, layer: NormAct2d) -> str:
    """The action of a norm's row."""
    kind = layer.kind.upper()
    if place.activation is None:
        dropped = layer.bias is None and getattr(place.norm, "bias", None) is not None
        return f"{kind}, no activation behind it{': scale kept, shift dropped' if dropped else ''}"
    inside = (
        f" with {type(layer.drop).__name__} inside"
        if not isinstance(layer.drop, nn.Identity)
        else ""
    )
    copied = ", a copy of it handed on, as it is changed in place" if layer._forward_hooks else ""
    return f"{kind} + {_class_name(layer.act)}{' + PN' if layer.proxy else ''}{inside}{copied}"


def _class_name(activation: nn.Module) -> str:
    """The activation's class, or what a wrapper wraps."""
    inner = getattr(activation, "function", activation)
    return type(inner).__name__
