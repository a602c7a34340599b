"""Recomputation: one kept map per layer instead of two.

Autograd keeps the output z of a NormAct2d for the convolution that follows and for the layer
itself, and the norm's input x besides. While a model of recompute() runs forward, saved-tensor
hooks replace z by a handle, from which backward rebuilds z: one norm and one activation more. All
other tensors are kept as usual. Autograd does not check what hooks keep for changes in place, so
the hooks check it.
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
    """Make model keep one map per NormAct2d layer with proxy instead of two; return the model.

    Results are the same. Safe to call twice. Without effect under torch.compile, torch.func and
    tracing. Of nested saved-tensor hooks only the inner ones count, so do not combine it, for the
    same part of a network, with others: torch's gradient checkpointing (use_reentrant=False) or
    save_on_cpu. Like autograd, it does not see changes through .data.
    """
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
    return model


class MadeOnce:
    """A tensor that several need in one backward pass: built first, freed after the last."""

    def __init__(self, build: Callable[[Tensor], Tensor]) -> None:
        self.build = build
        self.made: Tensor | None = None

    def take(self, x: Tensor, last: bool) -> Tensor:
        """build(x)."""
        made = self.build(x) if self.made is None else self.made
        self.made = None if last else made
        return made


class Recipe:
    """How to rebuild one layer's output from its input; holds the output while it is needed."""

    def __init__(self, build: Callable[[Tensor], Tensor], source: Tensor) -> None:
        self.once = MadeOnce(build)
        self.source, self.source_version = source.detach(), _version(source)
        self.output: Callable[[], Tensor | None] = lambda: None
        self.version = 0
        self.handles = 0

    def watch(self, z: Tensor) -> None:
        """Register z, which the layer is about to save, as the output of this recipe."""
        self.output = weakref.ref(z)
        _RUN.recipes[z.data_ptr()] = self

    def makes(self, saved: Tensor) -> bool:
        """True if saved is the output: alive (else its memory may be reused) and unchanged."""
        z = self.output()
        if z is not None and self.handles == 0:
            # the layer itself saves its output first, right after making it in place
            self.version = z._version
        return (
            z is not None
            and z._version == self.version
            and saved.data_ptr() == z.data_ptr()
            and saved.shape == z.shape
            and saved.stride() == z.stride()
            and saved.dtype == z.dtype
        )

    def take(self, last: bool) -> Tensor:
        """The output, built once and freed after the last call.

        Raises RuntimeError if the input changed.
        """
        if _version(self.source) != self.source_version:
            raise RuntimeError(
                "the input of a NormAct2d was changed in place, so its output cannot be recomputed:"
                " do not use recompute here, or change the input out of place"
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
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{tensor.type()} {list(tensor.shape)}] is at version "
                f"{tensor._version}; expected version {version} instead. Change a copy of it, or "
                "change it after backward. Hint: find the operation that failed to compute its "
                "gradient with torch.autograd.set_detect_anomaly(True)."
            )
        return tensor


class _Run(threading.local):
    """The recipes and the saved-tensor hooks of this thread's forward pass."""

    def __init__(self) -> None:
        self.recipes: dict[int, Recipe] = {}
        self.entered: list[tuple[nn.Module, saved_tensors_hooks | None]] = []


_RUN = _Run()


def is_recomputing() -> bool:
    """True if layers shall register recipes."""
    return bool(_RUN.entered) and _RUN.entered[-1][1] is not None and torch.is_grad_enabled()


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _enter(model: nn.Module, inputs: tuple[object, ...]) -> None:
    while _is_inside(model):  # a keyboard interrupt left the forward before, without _leave
        _leave_one()
    hooks = None
    if torch.is_grad_enabled() and not is_transformed():
        hooks = saved_tensors_hooks(_pack, _unpack)
        hooks.__enter__()
    _RUN.entered.append((model, hooks))


def _leave(model: nn.Module, inputs: tuple[object, ...], output: object) -> None:
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
    # The layer saves its output first and needs it last: its backward follows its successors'.
    return _Handle(recipe, last=recipe.handles == 1)


def _unpack(saved: _Kept | _Handle) -> Tensor:
    return saved.unpack()
