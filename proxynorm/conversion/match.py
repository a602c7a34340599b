"""Decide from what runs showed what becomes of each norm and its activation.

Say of all that have no place why not.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from proxynorm.conversion.kinds import idles, is_norm
from proxynorm.conversion.observe import NormCall, Observation
from proxynorm.conversion.rewrite import CannotRewriteError, Edit, Site, plan_edits
from proxynorm.nn.freeze import hand_on_copy


@dataclass(frozen=True)
class Place:
    """Where one norm goes.

    Attributes:
        activation: the activation it takes over; None if there is none. It belongs to a copy of the
            network.
        name: the activation's module, by its name; None if it is a function, or a part of the norm.
        between: names of the modules between the two, which go inside the new layer.
        is_overwritten: the network changes the result in place.
    """

    activation: nn.Module | None = None
    name: str | None = None
    between: tuple[str, ...] = ()
    is_overwritten: bool = False

    def activation_in(self, model: nn.Module, norm: nn.Module) -> nn.Module | None:
        """The activation as the network itself, or any copy of it, has it."""
        if self.name is not None:
            return model.get_submodule(self.name)
        return self.activation if getattr(norm, "act", None) is None else norm.act


@dataclass
class Plan:
    """All changes of a conversion, by qualified names.

    Attributes:
        places: the norms to replace.
        left: the norms that stay, each with the reason.
        identities: activation modules that the identity replaces.
        edits: calls to take out of the forwards of modules.
    """

    places: dict[str, Place] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    identities: list[str] = field(default_factory=list)
    edits: dict[str, list[Edit]] = field(default_factory=dict)


class NoPlaceError(ValueError):
    """Says why one norm cannot be placed."""


def make_plan(
    model: nn.Module,
    training: Observation,
    evaluation: Observation,
    keep: Iterable[str],
    no_activation: Iterable[str],
    proxy: bool,
) -> Plan:
    """The changes that convert has to make.

    Raises:
        ValueError: norms cannot be placed (all are named, with the reasons), or nothing is left to
            do.
    """
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    kept, bare = (
        _matching("keep", keep, norms, model),
        _matching("no_activation", no_activation, norms, model),
    )
    plan, refused = Plan(left=dict.fromkeys(kept, "left as it is: keep")), {}
    calls = {name: (training.norms.get(name, []), evaluation.norms.get(name, [])) for name in norms}
    for name, norm in norms.items():
        try:
            if name not in kept:
                place = _place(model, norm, *calls[name], name in bare)
                if isinstance(norm, nn.LayerNorm) and place.activation is None:
                    plan.left[name] = "left as it is: a layer norm without an activation behind it"
                else:
                    plan.places[name] = place
        except NoPlaceError as error:
            refused[name] = str(error)
    joined = {
        call: name
        for name in plan.places
        for call in (*calls[name][0], *calls[name][1])
        if plan.places[name].activation is not None
    }
    refused |= _plan_activations(model, plan, (training, evaluation), joined)
    if refused:
        raise _refusal(refused, norms)
    _check_something_to_do(model, plan, proxy)
    return plan


def _check_something_to_do(model: nn.Module, plan: Plan, proxy: bool) -> None:
    kind = type(model).__name__
    if not plan.places:
        raise ValueError(
            f"nothing to convert: this {kind} has no batch, group or instance norm, and no "
            "channels-first "
            "layer norm with an activation behind it"
        )
    if proxy and all(place.activation is None for place in plan.places.values()):
        raise ValueError(
            f"PN has no place: no norm of this {kind} has an activation right behind it"
        )


def _matching(
    option: str, patterns: Iterable[str], norms: dict[str, nn.Module], model: nn.Module
) -> list[str]:
    """Names of the norms that an option's names and patterns mean."""
    found = {
        p: [n for n in norms if n == p or fnmatch.fnmatchcase(n, p)] for p in sorted(set(patterns))
    }
    for pattern, names in found.items():
        if not names:
            raise ValueError(
                f"{option} names {pattern!r}, which is no norm of this {type(model).__name__}"
            )
    return sorted({name for names in found.values() for name in names})


def _place(
    model: nn.Module,
    norm: nn.Module,
    training: list[NormCall],
    evaluation: list[NormCall],
    is_bare: bool,
) -> Place:
    """One norm's place; raises NoPlaceError."""
    _check_norm(norm)
    calls = [*training, *evaluation]
    if not calls:
        raise NoPlaceError("no call of it was seen when the network ran on the example inputs")
    for mode, found in (("", training), ("in evaluation mode, ", evaluation)):
        for call in found:
            is_excused = is_bare and "normalizes no maps" not in (call.problem or "")
            if call.problem is not None and not is_excused:
                raise NoPlaceError(mode + call.problem)
    if is_bare:
        return Place()
    first = (training or evaluation)[0]
    if any(_state(c.activation) != _state(first.activation) for c in calls if c in training):
        raise NoPlaceError("it is called at places with different activations")
    if any(c.between != first.between for c in training):
        raise NoPlaceError("it is called at places with different dropout or pooling behind it")
    for call in evaluation:
        lasting = [n for n in first.between if not idles(model.get_submodule(n))]
        between = [n for n in call.between if not idles(model.get_submodule(n))]
        if _state(call.activation) != _state(first.activation) or between != lasting:
            raise NoPlaceError(
                "what stands behind it in evaluation differs from what does in training"
            )
    if first.activation is not None and _has_hooks(first.activation):
        raise NoPlaceError(
            "the activation behind it has hooks, which would be lost: remove them first"
        )
    is_overwritten = any(call.is_overwritten for call in calls)
    return Place(first.activation, first.name, tuple(first.between), is_overwritten)


def _check_norm(norm: nn.Module) -> None:
    """Raise NoPlaceError for what a new layer could not take over."""
    libraries = ("torch.", "timm.", "torchvision.", "proxynorm.")
    if not type(norm).forward.__module__.startswith(libraries):
        raise NoPlaceError("its class has a forward of its own, which may compute something else")
    if _has_hooks(norm):
        raise NoPlaceError("it has hooks, which would be lost: remove them first")
    if parametrize.is_parametrized(norm):
        raise NoPlaceError(
            f"its {', '.join(norm.parametrizations)} is parametrized, which would be lost: use "
            "parametrize.remove_parametrizations first"
        )


def _has_hooks(module: nn.Module) -> bool:
    hooks = (
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )
    return any(hook is not hand_on_copy for hook in hooks)


def _state(activation: nn.Module | None) -> tuple | None:
    """Equal for activations that compute the same.

    Parameters are the same, other attributes have the same value.
    """
    if activation is None:
        return None
    attributes = [
        (
            type(m),
            {
                k: repr(v)
                for k, v in vars(m).items()
                if k[0] != "_" and k not in ("training", "inplace")
            },
        )
        for m in activation.modules()
    ]
    return attributes, [id(p) for p in activation.parameters()]


def _plan_activations(
    model: nn.Module, plan: Plan, seen: tuple[Observation, ...], joined: dict[NormCall, str]
) -> dict[str, str]:
    """Add identities and edits to the plan.

    Return the norms whose activation cannot be taken out, with the reason.
    """
    modules, sites = _merged(seen, "modules"), _merged(seen, "sites")
    shared = {n for n, calls in modules.items() if any(call not in joined for call in calls)}
    used = {call.name for call in joined if call.name is not None}
    plan.identities = sorted(used - shared)
    by_owner: dict[str, dict[Site, set[str]]] = {}
    refused = {}
    for call, norm in joined.items():
        site = call.site
        if site is None or call.name in used - shared:
            continue
        if any(other not in joined for other in sites[site]):
            refused[norm] = f"the call of its activation at {site} serves other values too"
        elif site.owner is None:
            refused[norm] = f"its activation at {site} is called in no method of a module"
        else:
            by_owner.setdefault(site.owner, {}).setdefault(site, set()).add(norm)
    for owner, group in by_owner.items():
        try:
            plan.edits[owner] = plan_edits(model.get_submodule(owner), group)
        except CannotRewriteError as error:
            names = {name for found in group.values() for name in found}
            where = ", ".join(sorted({str(site) for site in group}))
            refused |= dict.fromkeys(
                names, f"its activation at {where} cannot be taken out: {error}"
            )
    advice = ". Make the activation a module of its own, such as self.act1 = nn.ReLU()"
    return {name: reason + advice for name, reason in refused.items()}


def _merged(seen: tuple[Observation, ...], attribute: str) -> dict:
    result: dict = {}
    for each in seen:
        for key, calls in getattr(each, attribute).items():
            result.setdefault(key, []).extend(calls)
    return result


def _refusal(reasons: dict[str, str], norms: dict[str, nn.Module]) -> ValueError:
    """The error for norms that cannot be placed: their names by kind and reason."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(f"({type(norms[name]).__name__}): {why}", []).append(name)
    told = "; ".join(f"{', '.join(names)} {why}" for why, names in groups.items())
    them = "it as it is" if len(reasons) == 1 else "them as they are"
    return ValueError(
        f"cannot place {told}. Leave {them} with keep={list(reasons)}, or, if no activation "
        "follows, "
        f"convert {'it' if len(reasons) == 1 else 'them'} with no_activation={list(reasons)}"
    )
