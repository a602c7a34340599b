"""Decide what happens to each norm, from the observed runs, or why it cannot be replaced."""

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
from proxynorm.nn.freeze import clone_output

NOT_CALLED = "no call of it was seen when the network ran on the example inputs"


@dataclass
class Plan:
    """All changes of a conversion, by qualified names."""

    # the norms to replace, each with a call that shows what follows it
    norms: dict[str, NormCall] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)  # norms whose result is changed in place
    left: dict[str, str] = field(default_factory=dict)  # norms that stay, with the reason
    identities: list[str] = field(default_factory=list)  # activations to replace by the identity
    # new source of modules' methods, without the activation calls at `sites`
    edits: dict[str, Edits] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)


def make_plan(
    model: nn.Module,
    seen: Observation,
    keep: Iterable[str],
    no_activation: Iterable[str],
    proxy: bool,
) -> Plan:
    """The changes that convert must make.

    Raises:
        ValueError: norms cannot be replaced (all are named, with the reasons), or there is nothing
            to convert.
    """
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    kind = type(model).__name__
    kept = _matching("keep", keep, norms, kind)
    bare = _matching("no_activation", no_activation, norms, kind)
    plan = Plan(left=dict.fromkeys(kept, "keep"))
    joined: list[NormCall] = []
    refused: dict[str, str] = {}
    failures = [f"; in {mode} it failed with {error}" for mode, error in seen.errors.items()]
    for name, norm in norms.items():
        if name in kept:
            continue
        calls = [call for call in seen.calls if call.norm == name]
        if not calls:
            (refused if failures else plan.left)[name] = NOT_CALLED + "".join(failures)
            continue
        if name in bare and own_activation(norm) is None:  # ignore what was seen behind it
            calls = [NormCall(name, call.value) for call in calls]
        # if calls differ in what follows them, verification will fail
        call = next((c for c in calls if c.activation is not None), calls[0])
        why = _hindrance(norm, calls)
        if isinstance(norm, nn.LayerNorm) and (why or call.activation is None):
            plan.left[name] = why or "a layer norm without an activation behind it"
        elif why is not None:
            refused[name] = why
        else:
            plan.norms[name] = call
            joined += [c for c in calls if c.activation is not None]
            plan.overwritten |= {name} if any(c.is_overwritten for c in calls) else set()
    refused |= _plan_activations(model, plan, seen, joined)
    if refused:
        groups: dict[str, list[str]] = {}
        for name, why in refused.items():
            groups.setdefault(f"({type(norms[name]).__name__}): {why}", []).append(name)
        listing = "; ".join(f"{', '.join(names)} {why}" for why, names in groups.items())
        raise ValueError(
            f"cannot place {listing}. Leave such a norm as it is with keep={list(refused)}, or, if "
            f"no activation follows it, convert it with no_activation={list(refused)}"
        )
    _check_something_to_do(kind, plan, proxy)
    return plan


def _matching(option: str, patterns: Iterable[str], norms: Iterable[str], kind: str) -> set[str]:
    """The names of the norms that match an option's names and patterns."""
    if isinstance(patterns, str):
        raise TypeError(f"{option} is a list of names: {option}=[{patterns!r}]")
    names: set[str] = set()
    for pattern in patterns:
        found = [n for n in norms if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not found:
            raise ValueError(f"{option} names {pattern!r}, which is no norm of this {kind}")
        names.update(found)
    return names


def _hindrance(norm: Any, calls: list[NormCall]) -> str | None:
    """The reason why a norm cannot be replaced; None if it can."""
    libraries = ("torch.", "timm.", "torchvision.", "proxynorm.")
    if not type(norm).forward.__module__.startswith(libraries):
        return "its class has a forward of its own, which may compute something else"
    activations = [call.activation for call in calls if call.activation is not None]
    parts = [norm, *activations]
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooks = [hook for part in parts for name in names for hook in getattr(part, name).values()]
    has_hooks = any(hook is not clone_output for hook in hooks)
    if has_hooks or any(map(parametrize.is_parametrized, parts)):
        return (
            "it, or the activation behind it, has hooks or parametrizations, which would be lost: "
            "remove them first"
        )
    for shape in (tuple(call.value.shape) for call in calls):
        if len(shape) != 4:
            return f"it normalizes no maps (N, C, H, W): its input has shape {shape}"
    for call in calls:
        if call.problem is not None:
            return call.problem
    # verification finds activations that differ in other ways than class and parameters
    if len({(type(act), *map(id, act.parameters())) for act in activations}) > 1:
        return "its calls, or training and evaluation, differ in the activation behind it"
    return None


def _plan_activations(
    model: nn.Module, plan: Plan, seen: Observation, joined: list[NormCall]
) -> dict[str, str]:
    """Add identities and edits to the plan; return the norms for which this fails, with reasons."""
    shared = {name for name, call in seen.activations if call not in joined}
    plan.identities = sorted({c.name for c in joined if c.name is not None} - shared)
    by_owner: dict[str | None, list[NormCall]] = {}
    for call in joined:
        if call.site is not None and call.name not in plan.identities:
            by_owner.setdefault(call.site.owner, []).append(call)
    refused: dict[str, str] = {}
    for owner, calls in by_owner.items():
        sites = list(dict.fromkeys(call.site for call in calls if call.site is not None))
        try:
            if owner is None:
                raise CannotRewriteError("it is called in no plain method of a module")
            plan.edits[owner] = plan_edits(model.get_submodule(owner), sites)
            plan.sites += sites
        except CannotRewriteError as error:
            why = (
                f"its activation at {', '.join(sorted(map(str, sites)))} cannot be taken out: "
                f"{error}. Make the activation a module of its own, such as self.act1 = nn.ReLU()"
            )
            refused |= {call.norm: why for call in calls}
    return refused


def _check_something_to_do(kind: str, plan: Plan, proxy: bool) -> None:
    """Raise ValueError if there is nothing to convert; warn about norms that never ran."""
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
            f"convert leaves {', '.join(idle)} of this {kind} as it is: {NOT_CALLED}",
            stacklevel=5,  # the line that calls convert
        )
