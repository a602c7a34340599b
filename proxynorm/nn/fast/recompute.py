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

from proxynorm.nn.fast.precision import is_transformed


def recompute(model: nn.Module) -> nn.Module:
    """Makes model's forward passes keep one map per NormAct2d layer with proxy instead of two; returns the model.

    Results are the same. Safe to call twice. Without effect under torch.compile, torch.func and tracing. It takes the
    place of other saved-tensor hooks: torch's gradient checkpointing is one (use_reentrant=False) and save_on_cpu another,
    and of two that are nested only the inner one counts. Use one or the other for a part of a network. As autograd, it
    does not see changes through .data: backward rebuilds what the layer had put out before them.
    """
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
    return model


class MadeOnce:
    """What several need in one backward pass, from the layer's input: made for the first, let go after the last."""

    def __init__(self, build: Callable[[Tensor], Tensor]) -> None:
        self.build = build
        self.made: Tensor | None = None

    def take(self, x: Tensor, last: bool) -> Tensor:
        """What build makes of x."""
        made = self.build(x) if self.made is None else self.made
        self.made = None if last else made
        return made


class Recipe:
    """How to rebuild the output of one layer from its input, and the output itself while backward still needs it."""

    def __init__(self, build: Callable[[Tensor], Tensor], source: Tensor) -> None:
        self.once = MadeOnce(build)
        self.source, self.source_version = source.detach(), _version(source)
        self.output: Callable[[], Tensor | None] = lambda: None
        self.version = 0
        self.handles = 0

    def watch(self, z: Tensor) -> None:
        """From now on z, of which the layer will save itself, is what this recipe makes."""
        self.output = weakref.ref(z)
        _RUN.recipes[z.data_ptr()] = self

    def makes(self, saved: Tensor) -> bool:
        """Whether saved is the output: alive still (else its memory may be another's) and unchanged."""
        z = self.output()
        if z is not None and self.handles == 0:
            self.version = (
                z._version
            )  # the layer itself saves its output first, right after making it in place
        return (
            z is not None
            and z._version == self.version
            and saved.data_ptr() == z.data_ptr()
            and saved.shape == z.shape
            and saved.stride() == z.stride()
            and saved.dtype == z.dtype
        )

    def take(self, last: bool) -> Tensor:
        """The output, rebuilt at the first call and let go after the last. Raises RuntimeError if the input changed."""
        if _version(self.source) != self.source_version:
            raise RuntimeError(
                "the input of a NormAct2d was changed in place, so its output cannot be recomputed: "
                "do not use recompute here, or change the input out of place"
            )
        return self.once.take(self.source, last)


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
        if _version(tensor) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} "
                "instead. Change a copy of it, or change it after backward. Hint: enable anomaly detection to find the "
                "operation that failed to compute its gradient, with torch.autograd.set_detect_anomaly(True)."
            )
        return tensor


class _Run(threading.local):
    """The recipes of the forward pass that this thread is in, and its saved-tensor hooks; none outside of one."""

    def __init__(self) -> None:
        self.recipes: dict[int, Recipe] = {}
        self.entered: list[tuple[nn.Module, saved_tensors_hooks | None]] = []


_RUN = _Run()


def is_recomputing() -> bool:
    """Whether layers shall hand in recipes."""
    return bool(_RUN.entered) and _RUN.entered[-1][1] is not None and torch.is_grad_enabled()


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _enter(model: nn.Module, inputs: tuple) -> None:
    while _is_inside(model):  # a keyboard interrupt left the forward before, without _leave
        _leave_one()
    hooks = None
    if torch.is_grad_enabled() and not is_transformed():
        hooks = saved_tensors_hooks(_pack, _unpack)
        hooks.__enter__()
    _RUN.entered.append((model, hooks))


def _leave(model: nn.Module, inputs: tuple, output: object) -> None:
    while _is_inside(model):
        _leave_one()


def _is_inside(model: nn.Module) -> bool:
    return any(entered is model for entered, _ in _RUN.entered)


def _leave_one() -> None:
    _, hooks = _RUN.entered.pop()
    if hooks is not None:
        hooks.__exit__(None, None, None)
    if not _RUN.entered:
        _RUN.recipes.clear()


def _pack(saved: Tensor) -> _Kept | _Handle:
    recipe = _RUN.recipes.get(saved.data_ptr()) if saved.layout is torch.strided else None
    if recipe is None or not recipe.makes(saved):
        return _Kept(
            saved, _version(saved)
        )  # an operation's own output comes detached, with the same version counter
    recipe.handles += 1
    # the layer itself saves its output first and needs it last: its backward follows that of every successor
    return _Handle(recipe, last=recipe.handles == 1)


def _unpack(saved: _Kept | _Handle) -> Tensor:
    return saved.unpack()
