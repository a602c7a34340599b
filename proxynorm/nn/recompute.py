"""Keeps one map a layer: a convolution's saved input is replaced by how to rebuild it from the norm's input.

The output z of a NormAct2d is kept for backward by the convolution that follows, and by the layer itself; the norm's
input x is kept besides. While a model of recompute() runs forward, saved-tensor hooks put a handle in z's place, from
which backward rebuilds z: one norm and one clamp or activation more. What no handle fits is kept as ever. Autograd
does not look after what hooks keep, so its check for changes in place is made here.
"""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .fused import is_transformed


def recompute(model: nn.Module) -> nn.Module:
    """Makes model's forward passes keep one map per NormAct2d layer with proxy instead of two; returns the model.

    Results are the same. Safe to call twice. Without effect under torch.compile, torch.func and tracing, and inside of
    gradient checkpointing, which has hooks of its own.
    """
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
    return model


class Recipe:
    """How to rebuild the output of one layer from its input, and the output itself while backward still needs it."""

    def __init__(self, build: Callable[[Tensor], Tensor], source: Tensor) -> None:
        self.build = build
        self.source, self.source_version = source.detach(), source._version
        self.output: Callable[[], Tensor | None] = lambda: None
        self.version = 0
        self.rebuilt: Tensor | None = None
        self.handles = 0

    def watch(self, z: Tensor) -> None:
        """From now on z is what this recipe makes."""
        self.output = weakref.ref(z)
        _RUN.recipes[z.data_ptr()] = self

    def makes(self, saved: Tensor) -> bool:
        """Whether saved is the output: alive still (else its memory may be another's) and unchanged."""
        z = self.output()
        if z is not None and self.handles == 0:
            self.version = z._version  # the layer itself saves its output first, right after making it in place
        return (z is not None and z._version == self.version and saved.data_ptr() == z.data_ptr()
                and saved.shape == z.shape and saved.stride() == z.stride() and saved.dtype == z.dtype)

    def take(self, last: bool) -> Tensor:
        """The output, rebuilt at the first call and let go after the last. Raises RuntimeError if the input changed."""
        if self.source._version != self.source_version:
            raise RuntimeError("the input of a NormAct2d was changed in place, so its output cannot be recomputed: "
                               "do not use recompute here, or change the input out of place")
        z = self.build(self.source) if self.rebuilt is None else self.rebuilt
        self.rebuilt = None if last else z
        return z


class _Handle(NamedTuple):
    recipe: Recipe
    last: bool

    def unpack(self) -> Tensor:
        with torch.no_grad():
            return self.recipe.take(self.last)


class _Kept(NamedTuple):
    """A tensor as autograd would keep it: with the version that it had."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        tensor, version = self
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} "
                "instead. Change a copy of it, or change it after backward. Hint: enable anomaly detection to find the "
                "operation that failed to compute its gradient, with torch.autograd.set_detect_anomaly(True).")
        return tensor


class _Run(threading.local):
    """The recipes of the forward pass that this thread is in, and its saved-tensor hooks; none outside of one."""

    def __init__(self) -> None:
        self.recipes: dict[int, Recipe] = {}
        self.hooks: list[saved_tensors_hooks | None] = []


_RUN = _Run()


def is_recomputing() -> bool:
    """Whether layers shall hand in recipes."""
    return bool(_RUN.hooks) and _RUN.hooks[-1] is not None and torch.is_grad_enabled()


def _enter(model: nn.Module, inputs: tuple) -> None:
    hooks = None
    if torch.is_grad_enabled() and not is_transformed():
        hooks = saved_tensors_hooks(_pack, _unpack)
        hooks.__enter__()
    _RUN.hooks.append(hooks)


def _leave(model: nn.Module, inputs: tuple, output: object) -> None:
    hooks = _RUN.hooks.pop() if _RUN.hooks else None
    if hooks is not None:
        hooks.__exit__(None, None, None)
    if not _RUN.hooks:
        _RUN.recipes.clear()


def _pack(saved: Tensor) -> _Kept | _Handle:
    recipe = _RUN.recipes.get(saved.data_ptr())
    if recipe is None or not recipe.makes(saved):
        return _Kept(saved, saved._version)  # an operation's own output comes detached, with the same version counter
    recipe.handles += 1
    # the layer itself saves its output first and needs it last: its backward follows that of every successor
    return _Handle(recipe, last=recipe.handles == 1)


def _unpack(saved: _Kept | _Handle) -> Tensor:
    return saved.unpack()
