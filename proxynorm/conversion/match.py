"""Decide from what runs showed what becomes of each norm; say why one cannot be replaced."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from proxynorm.conversion.kinds import is_norm, own_activation
from proxynorm.conversion.observe import NormCall, Observation
from proxynorm.conversion.rewrite import CannotRewriteError, Edits, Site, plan_edits
from proxynorm.nn.freeze import hand_on_copy

NOT_CALLED = "no call of it was seen when the network ran on the example inputs"


@dataclass
class Plan:
    """All changes of a conversion, by qualified names.

    Attributes:
        norms: the norms to replace, each with a call that shows what follows it.
        overwritten: those of them whose result the network changes in place.
        left: the norms that stay, each with the reason.
        identities: activation modules that the identity replaces.
        edits: new methods of modules, without the calls of activations.
        sites: where those calls were.
    """

    norms: dict[str, NormCall] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)
    identities: list[str] = field(default_factory=list)
    edits: dict[str, Edits] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)


def make_plan(
    model: nn.Module,
    seen: Observation,
    keep: Iterable[str],
    no_activation: Iterable[str],
    proxy: bool,
) -> Plan:
    """The changes that convert has to make.

    Raises:
        ValueError: norms cannot be replaced (all are named, with the reasons), or nothing is left
            to do.
    """
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    kind = type(model).__name__
    kept = _matching("keep", keep, norms, kind)
    bare = _matching("no_activation", no_activation, norms, kind)
    plan = Plan(left=dict.fromkeys(kept, "keep"))
    joined: list[NormCall] = []
    refused: dict[str, str] = {}
    for name in (n for n in norms if n not in kept):
        calls = [call for call in seen.calls if call.norm == name]
        is_layer_norm = isinstance(norms[name], nn.LayerNorm)
        why = _hindrance(norms[name], calls, seen, name in bare)
        if is_layer_norm and why is None and (name in bare or calls[0].activation is None):
            why = "a layer norm without an activation behind it"
        if why is not None:
            # a layer norm depends on no batch, and a norm that does not run on nothing
            (plan.left if is_layer_norm or why == NOT_CALLED else refused)[name] = why
        elif name in bare and own_activation(norms[name]) is None:
            plan.norms[name] = NormCall(name)
        else:
            plan.norms[name] = calls[0]
            joined += calls if calls[0].activation is not None else []
            plan.overwritten |= {name} if any(c.is_overwritten for c in calls) else set()
    refused |= _plan_activations(model, plan, seen, joined)
    if refused:
        raise _refusal(refused, norms)
    _check_something_to_do(kind, plan, proxy)
    return plan


def _matching(option: str, patterns: Iterable[str], norms: Iterable[str], kind: str) -> set[str]:
    """Names of the norms that an option's names and patterns mean."""
    names: set[str] = set()
    for pattern in patterns:
        found = [n for n in norms if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not found:
            raise ValueError(f"{option} names {pattern!r}, which is no norm of this {kind}")
        names.update(found)
    return names


def _hindrance(norm: Any, calls: list[NormCall], seen: Observation, is_bare: bool) -> str | None:
    """Why a norm cannot be replaced; None if it can.

    What calls have between norm and activation is not compared here: it is verified.
    """
    libraries = ("torch.", "timm.", "torchvision.", "proxynorm.")
    if not type(norm).forward.__module__.startswith(libraries):
        return "its class has a forward of its own, which may compute something else"
    if _has_hooks(norm):
        return "it has hooks, which would be lost: remove them first"
    if parametrize.is_parametrized(norm):
        return (
            f"its {', '.join(norm.parametrizations)} is parametrized, which would be lost: use "
            "parametrize.remove_parametrizations first"
        )
    if not calls:
        failed = [f"; in {mode} it failed with {error}" for mode, error in seen.errors.items()]
        return NOT_CALLED + "".join(failed)
    for call in calls:
        # no_activation excuses all but a wrong rank
        if call.problem and not (is_bare and "normalizes no maps" not in call.problem):
            return call.problem
    if is_bare:
        return None
    activation = calls[0].activation
    if len({_key(call.activation) for call in calls}) > 1:
        return "its calls, or training and evaluation, differ in the activation behind it"
    if activation is not None and _has_hooks(activation):
        return "the activation behind it has hooks, which would be lost: remove them first"
    return None


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    return any(hook is not hand_on_copy for hook in hooks)


def _key(activation: nn.Module | None) -> object:
    """Class and parameters; activations that differ in more are told apart by verification."""
    return None if activation is None else (type(activation), *map(id, activation.parameters()))


def _plan_activations(
    model: nn.Module, plan: Plan, seen: Observation, joined: list[NormCall]
) -> dict[str, str]:
    """Add identities and edits to the plan.

    Return the norms whose activation cannot be taken out, with the reason.
    """
    found = set(joined)
    shared = {name for name, call in seen.activations if call not in found}
    plan.identities = sorted({c.name for c in joined if c.name is not None} - shared)
    by_owner: dict[str, list[NormCall]] = {}
    refused = {}
    for call in joined:
        if call.site is None or call.name in plan.identities:
            continue
        if call.site.owner is not None:
            by_owner.setdefault(call.site.owner, []).append(call)
        else:
            why = f"its activation at {call.site} is called in no plain method of a module"
            refused[call.norm] = why
    for owner, calls in by_owner.items():
        sites = list(dict.fromkeys(call.site for call in calls if call.site is not None))
        try:
            plan.edits[owner] = plan_edits(model.get_submodule(owner), sites)
            plan.sites += sites
        except CannotRewriteError as error:
            where = ", ".join(sorted(map(str, sites)))
            why = f"its activation at {where} cannot be taken out: {error}"
            refused |= {call.norm: why for call in calls}
    advice = ". Make the activation a module of its own, such as self.act1 = nn.ReLU()"
    return {name: reason + advice for name, reason in refused.items()}


def _refusal(reasons: dict[str, str], norms: dict[str, nn.Module]) -> ValueError:
    """The error for norms that cannot be replaced: their names by kind and reason."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(f"({type(norms[name]).__name__}): {why}", []).append(name)
    told = "; ".join(f"{', '.join(names)} {why}" for why, names in groups.items())
    return ValueError(
        f"cannot place {told}. Leave such a norm as it is with keep={list(reasons)}, or, if no "
        f"activation follows it, convert it with no_activation={list(reasons)}"
    )


def _check_something_to_do(kind: str, plan: Plan, proxy: bool) -> None:
    """Raise ValueError if not; warn of norms that were left because they never ran."""
    if not plan.norms:
        skipped = [name for name, why in plan.left.items() if why in ("keep", NOT_CALLED)]
        others = f" other than {', '.join(skipped)}" if skipped else ""
        raise ValueError(
            f"nothing to convert: this {kind} has no batch, group or instance norm{others}, and no "
            "channels-first layer norm with an activation behind it"
        )
    if proxy and all(call.activation is None for call in plan.norms.values()):
        raise ValueError(
            f"PN has no place: no norm of this {kind} has an activation right behind it"
        )
    if idle := [name for name, why in plan.left.items() if why == NOT_CALLED]:
        warnings.warn(
            f"convert leaves {', '.join(idle)} of this {kind} as it is: {NOT_CALLED}", stacklevel=4
        )
