"""Put NormAct2d into a network that exists: observe, match, replace, verify.

The network runs on example inputs, a copy at a time, and shows which activation follows each norm.
The same changes, made with the original norms and no PN, must then reproduce the network's outputs
bit for bit. Only after that is the network itself changed, so that a refused conversion leaves it
as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from proxynorm.conversion.kinds import is_activation, is_norm, is_other_norm, own_activation
from proxynorm.conversion.layer import Ties, make_layer
from proxynorm.conversion.match import Place, Plan, make_plan
from proxynorm.conversion.observe import Observation, Observer
from proxynorm.conversion.rewrite import apply_edits
from proxynorm.conversion.run import Run, copy_to_run, preserved_randomness, run, runs_of
from proxynorm.conversion.verify import StandIn, check_per_sample, check_same
from proxynorm.nn.fast.shared import share_moments
from proxynorm.nn.freeze import hand_on_copy, replace_modules
from proxynorm.nn.norm_act import NormAct2d
from proxynorm.nn.options import NormOptions
from proxynorm.nn.weights import standardize_weights

_MORE_DRAWS = 8  # further runs in training where random branches hid a norm


@dataclass(frozen=True)
class ConversionRow:
    """The action that convert took on one module.

    Attributes:
        module: its qualified name.
        kind: its class before the conversion.
        action: what became of it, or why it was left.
    """

    module: str
    kind: str
    action: str


class ConversionReport(list[ConversionRow]):
    """A list of ConversionRow that prints as an aligned table."""

    def __str__(self) -> str:
        rows = [("module", "kind", "action"), *((row.module, row.kind, row.action) for row in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{m:<{widths[0]}}  {k:<{widths[1]}}  {a}" for m, k, a in rows)


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
    in a forward (x * torch.sigmoid(x)) is refused. γ and β are new: make the optimizer afterwards.

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
        ValueError: a wrong norm or option, a network that does not run on the inputs, nothing to
            convert, norms that cannot be placed (all named, with the reasons), or outputs that
            differ; the model is then left as it was.
    """
    _check_arguments(model, keep, no_activation)
    options = NormOptions(norm, groups, eps, proxy_eps, norm_batch, moments, nodes)
    with preserved_randomness():
        call, training, evaluation = _observe(model, example_inputs)
        plan = make_plan(model, training, evaluation, keep, no_activation, options.spec.proxy)
        if verify:
            _verify(model, call, plan, options)
    layers = _make_layers(model, plan, options)
    _separate_shared_activations(model)
    rows = _rows(model, plan, layers)
    _apply(model, plan, layers)
    if options.spec.weight_standardization:
        _standardize(model, training, evaluation)
    if options.spec.proxy:
        share_moments(model)
    vars(model)["conversion_rows"] = rows  # no module, no parameter: nn.Module need not look
    return model


def _verify(model: nn.Module, call: Run, plan: Plan, options: NormOptions) -> None:
    """Raise ValueError unless copies show that the plan may be carried out."""
    check_same(model, call, lambda copied: _apply(copied, plan, _stand_ins(copied, plan)))
    if not options.spec.batch_statistics:
        check_per_sample(
            model, call, lambda copied: _apply(copied, plan, _make_layers(copied, plan, options))
        )


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


def standardize_before_norms(model: nn.Module, example_inputs: object = None) -> nn.Module:
    """Standardize the weights of the convolutions whose output reaches a norm, alone or in a sum.

    Return the model.
    """
    with preserved_randomness():
        _, training, evaluation = _observe(model, example_inputs)
    _standardize(model, training, evaluation)
    return model


def _standardize(model: nn.Module, training: Observation, evaluation: Observation) -> None:
    for name in sorted(training.feeding | evaluation.feeding):
        standardize_weights(model.get_submodule(name))


def _check_arguments(model: nn.Module, keep: object, no_activation: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"convert takes a network, an nn.Module, not {model!r}: make it first, with "
            "timm.create_model"
        )
    if is_norm(model):
        kind = type(model).__name__
        raise ValueError(
            f"this {kind} is no network but a norm: make a proxynorm.NormAct2d instead"
        )
    for option, names in (("keep", keep), ("no_activation", no_activation)):
        if isinstance(names, str):
            raise TypeError(f"{option} is a list of names: {option}=[{names!r}]")


def _refuse_set_forwards(model: nn.Module) -> None:
    """Raise ValueError if a forward was set on an object: its copy would run the original's."""
    found = [
        name or "the model itself"
        for name, module in model.named_modules()
        if "forward" in vars(module)
        and (is_norm(module) or is_activation(module) or not _is_torchs(module))
    ]
    if found:
        raise ValueError(
            f"cannot convert this {type(model).__name__}: a forward was set on the object "
            f"{', '.join(found)}, which may compute something else than its class: convert before "
            "setting it, or put it into a class"
        )


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _observe(model: nn.Module, example_inputs: object) -> tuple[Run, Observation, Observation]:
    """Run copies of the model in both modes; the way it was called, and what was seen.

    Where the network fails in one mode (a detector without targets, in training), what the other
    shows has to do.
    """
    _refuse_set_forwards(model)
    best, error = None, None
    for call in runs_of(model, example_inputs):
        copied = copy_to_run(model)
        _separate_shared_activations(copied)
        training, evaluation = (_observe_mode(copied, call, mode) for mode in (True, False))
        if training.error is None and evaluation.error is None:
            return call, training, evaluation
        if training.error is None or evaluation.error is None:
            best = best or (call, training, evaluation)
        error = evaluation.error or training.error
    if best is None:
        tried = "random images" if example_inputs is None else "the example inputs"
        advice = "pass example_inputs=" if example_inputs is None else "check example_inputs"
        raise ValueError(
            f"cannot run this {type(model).__name__} on {tried}: {advice}. The last error: {error}"
        )
    return best


def _observe_mode(copied: nn.Module, call: Run, training: bool) -> Observation:
    """Run a copy and return what was observed.

    In training, with as many draws as random branches need to show every norm.
    """
    seen = Observation()
    norms = {name for name, module in copied.named_modules() if is_norm(module)}
    for seed in range(1 + _MORE_DRAWS if training else 1):
        observer = Observer(copied, seen)
        try:
            with observer:
                output = run(copied, call, training, seed)
        except Exception as error:
            lines = str(error).strip().splitlines()
            return Observation(error=": ".join([type(error).__name__, *lines[:1]]))
        observer.finish(output)
        if norms <= set(seen.norms):
            break
    return seen


def _separate_shared_activations(model: nn.Module) -> None:
    """Give each attribute that holds a shared activation without parameters a copy of its own.

    The copies compute the same; each attribute can then be replaced without touching the others.
    """
    found = set()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves repetitions out
            if child is None or not is_activation(child) or any(True for _ in child.parameters()):
                continue
            if child in found:
                setattr(parent, name, copy.deepcopy(child))
            found.add(child)


def _stand_ins(copied: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The original norms, each with what followed it, for a copy of the network."""
    stand_ins: dict[str, nn.Module] = {}
    for name, place in plan.places.items():
        norm, activation, between = _parts(copied, name, place)
        act = [] if activation is None or own_activation(norm) else [activation]
        stand_ins[name] = StandIn(norm, *between, *act)
    return stand_ins


def _make_layers(model: nn.Module, plan: Plan, options: NormOptions) -> dict[str, nn.Module]:
    """The new layers, by the names of the norms; the model is not changed."""
    layers: dict[str, nn.Module] = {}
    ties: Ties = {}
    for name, place in plan.places.items():
        norm, activation, between = _parts(model, name, place)
        layer = make_layer(name, norm, activation, options, ties)
        if between:
            layer.drop = between[0] if len(between) == 1 else nn.Sequential(*between)
        if layer.proxied and place.is_overwritten:
            layer.register_forward_hook(hand_on_copy)
        layers[name] = layer
    return layers


def _parts(
    model: nn.Module, name: str, place: Place
) -> tuple[nn.Module, nn.Module | None, list[nn.Module]]:
    """A norm, its activation, and the modules between them, of this copy of the network."""
    norm = model.get_submodule(name)
    activation = place.activation
    if place.name is not None:
        activation = model.get_submodule(place.name)
    elif activation is not None:
        activation = own_activation(norm) or activation
    return norm, activation, [model.get_submodule(inner) for inner in place.between]


def _apply(model: nn.Module, plan: Plan, layers: dict[str, nn.Module]) -> None:
    """Make the plan's changes in place, with the given layers for the norms."""
    _separate_shared_activations(model)
    inside = [name for place in plan.places.values() for name in place.between]
    replacements: dict[nn.Module, nn.Module] = {}
    for name in (*inside, *plan.identities):
        module = model.get_submodule(name)
        replacements[module] = nn.Identity().train(module.training)
    replacements |= {model.get_submodule(name): layer for name, layer in layers.items()}
    replace_modules(model, replacements)
    for name, edits in plan.edits.items():
        apply_edits(model.get_submodule(name), edits)


def _rows(model: nn.Module, plan: Plan, layers: dict[str, nn.Module]) -> ConversionReport:
    """List what the plan does with each module, in the network's order; made before it is done."""
    actions = {name: f"left as it is: {why}" for name, why in plan.left.items()}
    for name, edits in plan.edits.items():
        count = sum(len(edit.ordinals) for edit in edits)
        calls = "1 activation call" if count == 1 else f"{count} activation calls"
        actions[name] = f"{calls} of its forward joined with norms"
    for name, place in plan.places.items():
        actions[name] = _describe(model.get_submodule(name), place, layers[name])
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


def _describe(norm: nn.Module, place: Place, layer: nn.Module) -> str:
    """The action of a norm's row."""
    assert isinstance(layer, NormAct2d)
    kind = layer.kind.upper()
    if place.activation is None:
        dropped = layer.bias is None and getattr(norm, "bias", None) is not None
        return f"{kind}, no activation behind it{': scale kept, shift dropped' if dropped else ''}"
    inside = type(layer.drop).__name__
    inside = f" with {inside} inside" if inside != "Identity" else ""
    copied = ", a copy of it handed on, as it is changed in place" if layer._forward_hooks else ""
    # a wrapper of a function goes by the function's name
    activation = type(getattr(layer.act, "function", layer.act)).__name__
    return f"{kind} + {activation}{' + PN' if layer.proxy else ''}{inside}{copied}"
