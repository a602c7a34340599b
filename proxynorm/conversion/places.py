"""Finds where convert puts a new layer for each norm of a network, and says of all that have no place why not."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from proxynorm.conversion.dataflow import Flow
from proxynorm.conversion.elementwise import is_norm
from proxynorm.conversion.followers import Follower, Site
from proxynorm.conversion.neighbours import idles


@dataclass(frozen=True)
class Place:
    """Where one norm goes: the activation it takes over, the calls of it, the modules that come in between, and
    whether the network changes the result in place."""

    norm: nn.Module
    activation: nn.Module | None
    sites: tuple[Site, ...] = ()
    between: tuple[str, ...] = ()
    overwritten: bool = False


class NoPlaceError(ValueError):
    """Says why one norm cannot be placed."""


def hand_on_copy(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """Forward hook of a layer whose output the network changes in place, while the layer keeps it for backward."""
    return output.clone() if output.requires_grad else output


def find_places(model: nn.Module, flow: Flow, keep: set[str], proxy: bool) -> dict[str, Place]:
    """Every norm to replace, by name, with its place. Raises ValueError, naming all that have none."""
    names = {name: module for name, module in model.named_modules() if is_norm(module)}
    kept = {
        name
        for pattern in keep
        for name in names
        if name == pattern or fnmatch.fnmatchcase(name, pattern)
    }
    for pattern in sorted(keep):
        if not any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in kept):
            raise ValueError(
                f"keep names {pattern!r}, which is no norm of this {type(model).__name__}"
            )
    places, refused = {}, {}
    for name, module in names.items():
        try:
            place = None if name in kept else _place(model, name, module, flow)
        except NoPlaceError as error:
            refused[name] = str(error)
        else:
            places |= {name: place} if place is not None else {}
    refused |= _partly_taken(flow, places)
    if refused:
        raise _refusal(refused, names)
    if not places:
        raise ValueError(
            f"nothing to convert: this {type(model).__name__} has no batch norm or group norm, and no "
            "layer norm with an activation behind it"
        )
    if proxy and all(place.activation is None for place in places.values()):
        raise ValueError(
            f"PN has no place: no norm of this {type(model).__name__} has an activation right behind it"
        )
    return places


def _place(model: nn.Module, name: str, norm: nn.Module, flow: Flow) -> Place | None:
    """One norm's place; None for a layer norm without an activation, which stays. Raises NoPlaceError."""
    if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm3d)):
        raise NoPlaceError("it normalizes no maps (N, C, H, W)")
    if not type(norm).forward.__module__.startswith(
        ("torch.", "timm.", "torchvision.", "proxynorm.")
    ):
        raise NoPlaceError("its class has a forward of its own, which may compute something else")
    if _has_hooks(norm):
        raise NoPlaceError("it has hooks, which would be lost: take them off first")
    if parametrize.is_parametrized(norm):
        names = ", ".join(norm.parametrizations)
        raise NoPlaceError(
            f"its {names} is parametrized, which would be lost: use parametrize.remove_parametrizations first"
        )
    followers = flow.followers.get(name, [])
    overwritten = any(found.overwritten for found in followers)
    own = getattr(norm, "act", None)
    if own is not None and not isinstance(own, nn.Identity):
        return Place(norm, own, overwritten=overwritten)
    if not followers:
        raise NoPlaceError("no call of it is seen in what can be traced of the model")
    for found in followers:
        if found.problem is not None:
            raise NoPlaceError(found.problem)
    first = followers[0]
    if any(_signature(found) != _signature(first) for found in followers):
        raise NoPlaceError("it is called at places with different activations")
    for found in flow.evaluation.followers.get(name, []):
        if found.problem is not None:
            raise NoPlaceError(f"in evaluation mode, {found.problem}")
        if not any(_same_in_evaluation(model, found, other) for other in followers):
            raise NoPlaceError(
                "what stands behind it in evaluation differs from what does in training"
            )
    if isinstance(norm, nn.LayerNorm) and first.activation is None:
        return None
    if first.activation is not None and _has_hooks(first.activation):
        raise NoPlaceError(
            "the activation behind it has hooks, which would be lost: take them off first"
        )
    sites = tuple(found.site for found in followers if found.site is not None)
    return Place(norm, first.activation, sites, tuple(first.between), overwritten)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a user's hook is on the module."""
    hooks = [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]
    return any(hook is not hand_on_copy for hook in hooks)


def _signature(found: Follower) -> tuple:
    """What must be the same at all calls of a norm."""
    return _state(found.activation), tuple(found.between)


def _state(activation: nn.Module | None) -> tuple | None:
    """What activations that compute the same have in common: parameters are the same, other attributes of one value."""
    if activation is None:
        return None
    values = [
        (type(m), {k: repr(v) for k, v in vars(m).items() if k[0] != "_" and k != "training"})
        for m in activation.modules()
    ]
    return repr(activation), values, [id(p) for p in activation.parameters()]


def _same_in_evaluation(model: nn.Module, found: Follower, training: Follower) -> bool:
    """Whether a norm meets in evaluation what it does in training, dropout aside: the same call of an activation."""
    calls, kept = [], []
    for follower in (found, training):
        calls.append(follower.site and (follower.site.caller, follower.site.module))
        kept.append([name for name in follower.between if not idles(model.get_submodule(name))])
    return (
        calls[0] == calls[1]
        and kept[0] == kept[1]
        and _state(found.activation) == _state(training.activation)
    )


def _refusal(reasons: dict[str, str], norms: dict[str, nn.Module]) -> ValueError:
    """The error for norms that cannot be placed: their names by kind and reason."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(f"({type(norms[name]).__name__}): {why}", []).append(name)
    said = "; ".join(f"{', '.join(names)} {why}" for why, names in groups.items())
    return ValueError(
        f"cannot place {said}. Leave {'it as it is' if len(reasons) == 1 else 'them as they are'} with "
        f"keep={list(reasons)}"
    )


def _partly_taken(flow: Flow, places: dict[str, Place]) -> dict[str, str]:
    """The norms, with the reason, whose activation is one call of a forward that runs several times, and follows a norm
    only some of the times."""
    refused = {}
    for each in (flow, flow.evaluation):
        calls = {
            name: [found.site for found in each.followers.get(name, []) if found.site]
            for name in places
        }
        absorbed = [site for sites in calls.values() for site in sites]
        refused |= {
            name: f"the activation behind it, called in {site.caller or 'the model'}, serves other values too"
            for name, sites in calls.items()
            for site in sites
            if each.sites.count(site) != absorbed.count(site)
        }
    return refused
