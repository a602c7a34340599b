"""Decide from what runs showed what becomes of each norm; say of all without a place why."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from proxynorm.conversion.kinds import idles, is_norm
from proxynorm.conversion.observe import NormCall, Observation
from proxynorm.conversion.rewrite import CannotRewriteError, Edit, Site, plan_edits
from proxynorm.nn.freeze import hand_on_copy

NOT_CALLED = "no call of it was seen when the network ran on the example inputs"


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


class NotCalledError(NoPlaceError):
    """Says that a norm does not run."""


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
    kind = type(model).__name__
    kept = _matching("keep", keep, norms, kind)
    bare = _matching("no_activation", no_activation, norms, kind)
    plan = Plan(left=dict.fromkeys(kept, "keep"))
    joined: dict[NormCall, str] = {}
    refused: dict[str, str] = {}
    for name in (n for n in norms if n not in kept):
        is_layer_norm = isinstance(norms[name], nn.LayerNorm)
        try:
            place = _place(model, name, training, evaluation, name in bare)
            if is_layer_norm and place.activation is None:
                raise NoPlaceError("a layer norm without an activation behind it")
        except NoPlaceError as error:
            # a layer norm depends on no batch, and a norm that does not run on nothing
            may_stay = is_layer_norm or isinstance(error, NotCalledError)
            (plan.left if may_stay else refused)[name] = str(error)
            continue
        plan.places[name] = place
        if place.activation is not None:
            joined |= dict.fromkeys(_calls(name, training, evaluation), name)
    refused |= _plan_activations(model, plan, (training, evaluation), joined)
    if refused:
        raise _refusal(refused, norms)
    _check_something_to_do(kind, plan, proxy)
    return plan


def _check_something_to_do(kind: str, plan: Plan, proxy: bool) -> None:
    """Raise ValueError if not; warn of norms that were left because they never ran."""
    if not plan.places:
        skipped = [name for name, why in plan.left.items() if why in ("keep", NOT_CALLED)]
        others = f" other than {', '.join(skipped)}" if skipped else ""
        raise ValueError(
            f"nothing to convert: this {kind} has no batch, group or instance norm{others}, and no "
            "channels-first layer norm with an activation behind it"
        )
    if proxy and all(place.activation is None for place in plan.places.values()):
        raise ValueError(
            f"PN has no place: no norm of this {kind} has an activation right behind it"
        )
    if idle := [name for name, why in plan.left.items() if why == NOT_CALLED]:
        warnings.warn(
            f"convert leaves {', '.join(idle)} of this {kind} as it is: {NOT_CALLED}", stacklevel=4
        )


def _matching(option: str, patterns: Iterable[str], norms: Iterable[str], kind: str) -> set[str]:
    """Names of the norms that an option's names and patterns mean."""
    names: set[str] = set()
    for pattern in patterns:
        found = [n for n in norms if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not found:
            raise ValueError(f"{option} names {pattern!r}, which is no norm of this {kind}")
        names.update(found)
    return names


def _calls(name: str, *seen: Observation) -> list[NormCall]:
    return [call for each in seen for call in each.norms.get(name, [])]


def _place(
    model: nn.Module, name: str, training: Observation, evaluation: Observation, is_bare: bool
) -> Place:
    """One norm's place; raises NoPlaceError."""
    _check_norm(model.get_submodule(name))
    calls = _calls(name, training, evaluation)
    if not calls:
        for mode, seen in (("training", training), ("evaluation", evaluation)):
            if seen.error:
                raise NoPlaceError(f"{NOT_CALLED}; in {mode} it failed with {seen.error}")
        raise NotCalledError(NOT_CALLED)
    for mode, seen in (("", training), ("in evaluation mode, ", evaluation)):
        for call in _calls(name, seen):
            # no_activation excuses all but a wrong rank
            if call.problem and not (is_bare and "normalizes no maps" not in call.problem):
                raise NoPlaceError(mode + call.problem)
    if is_bare:
        return Place()
    first = calls[0]
    for call in _calls(name, training):
        if _state(call.activation) != _state(first.activation):
            raise NoPlaceError("it is called at places with different activations")
        if call.between != first.between:
            raise NoPlaceError("it is called at places with different dropout or pooling behind it")
    lasting = [[n for n in c.between if not idles(model.get_submodule(n))] for c in calls]
    if any(_state(c.activation) != _state(first.activation) for c in calls) or any(
        between != lasting[0] for between in lasting
    ):
        raise NoPlaceError("what stands behind it in evaluation differs from what does in training")
    if first.activation is not None and _has_hooks(first.activation):
        raise NoPlaceError(
            "the activation behind it has hooks, which would be lost: remove them first"
        )
    is_overwritten = any(call.is_overwritten for call in calls)
    return Place(first.activation, first.name, tuple(first.between), is_overwritten)


def _check_norm(norm: Any) -> None:
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
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    return any(hook is not hand_on_copy for hook in hooks)


def _state(activation: nn.Module | None) -> object:
    """Equal for activations that compute the same: classes, attributes and parameters are alike."""
    if activation is None:
        return None
    ignored = ("training", "inplace")
    attributes = [
        {k: repr(v) for k, v in vars(m).items() if k[0] != "_" and k not in ignored}
        for m in activation.modules()
    ]
    kinds = [type(m) for m in activation.modules()]
    return kinds, attributes, [id(p) for p in activation.parameters()]


def _plan_activations(
    model: nn.Module, plan: Plan, seen: tuple[Observation, ...], joined: dict[NormCall, str]
) -> dict[str, str]:
    """Add identities and edits to the plan.

    Return the norms whose activation cannot be taken out, with the reason.
    """
    others = {site for each in seen for site, c in each.sites.items() if not joined.keys() >= {*c}}
    shared = {
        name for each in seen for name, c in each.modules.items() if not joined.keys() >= {*c}
    }
    used = {call.name for call in joined if call.name is not None}
    plan.identities = sorted(used - shared)
    by_owner: dict[str, dict[Site, set[str]]] = {}
    refused = {}
    for call, norm in joined.items():
        site = call.site
        if site is None or call.name in used - shared:
            continue
        if site in others:
            refused[norm] = f"the call of its activation at {site} serves other values too"
        elif site.owner is None:
            refused[norm] = f"its activation at {site} is called in no plain method of a module"
        else:
            by_owner.setdefault(site.owner, {}).setdefault(site, set()).add(norm)
    for owner, group in by_owner.items():
        try:
            plan.edits[owner] = plan_edits(model.get_submodule(owner), group)
        except CannotRewriteError as error:
            where = ", ".join(sorted({str(site) for site in group}))
            why = f"its activation at {where} cannot be taken out: {error}"
            refused |= {name: why for names in group.values() for name in names}
    advice = ". Make the activation a module of its own, such as self.act1 = nn.ReLU()"
    return {name: reason + advice for name, reason in refused.items()}


def _refusal(reasons: dict[str, str], norms: dict[str, nn.Module]) -> ValueError:
    """The error for norms that cannot be placed: their names by kind and reason."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(f"({type(norms[name]).__name__}): {why}", []).append(name)
    told = "; ".join(f"{', '.join(names)} {why}" for why, names in groups.items())
    them, it = ("it as it is", "it") if len(reasons) == 1 else ("them as they are", "them")
    return ValueError(
        f"cannot place {told}. Leave {them} with keep={list(reasons)}, or, if no activation "
        f"follows, convert {it} with no_activation={list(reasons)}"
    )
