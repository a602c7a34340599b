"""Recomputation: one kept map per layer instead of two.

Autograd keeps the output z of a NormAct2d for the convolution that follows, and the norm's input x
besides. While a model of recompute() runs forward, saved-tensor hooks replace z by the way to make
it again from x, in backward: one norm and one activation more. All other tensors are kept as usual.
Autograd does not check what hooks keep for changes in place, so the hooks check it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

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


class Remade:
    """A layer's output, made again from its input once for all that need it in one backward."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self.make = make
        self.made: Tensor | None = None

    def replaces(self, z: Tensor, x: Tensor) -> None:
        """From now on, what would keep z keeps this and x."""
        _OUTPUTS[z] = _Kept(x.detach(), _version(x), self), z._version

    def take(self, x: Tensor, last: bool = False) -> Tensor:
        """make(x). The layer's own backward is the last to need it, after its successors'."""
        made = self.make(x) if self.made is None else self.made
        self.made = None if last else made
        return made


class _Kept(NamedTuple):
    """A tensor as autograd would keep it: with the version that it had.

    With a Remade, it is the input of the output that is made again.
    """

    tensor: Tensor
    version: int
    remade: Remade | None = None

    def unpack(self) -> Tensor:
        tensor, version = self.tensor, self.version
        if _version(tensor) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{tensor.type()} {list(tensor.shape)}] is at version "
                f"{tensor._version}; expected version {version} instead. It was changed in place "
                "before backward: change a copy of it, or change it later."
            )
        if self.remade is None:
            return tensor
        with torch.no_grad():
            return self.remade.take(tensor)


class _Run(threading.local):
    """The model whose forward pass this thread is in, and its saved-tensor hooks."""

    model: nn.Module | None = None
    hooks: saved_tensors_hooks | None = None


_RUN = _Run()
# what stands for each living output, and the version of the output that it makes
_OUTPUTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_recomputing() -> bool:
    """True if layers shall let go of their outputs."""
    return _RUN.hooks is not None


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _enter(model: nn.Module, inputs: tuple[object, ...]) -> None:
    _leave(model)  # a keyboard interrupt may have ended the forward before without it
    if _RUN.hooks is None and torch.is_grad_enabled() and not is_transformed():
        _RUN.model, _RUN.hooks = model, saved_tensors_hooks(_pack, lambda kept: kept.unpack())
        _RUN.hooks.__enter__()


def _leave(model: nn.Module, inputs: object = None, output: object = None) -> None:
    if _RUN.model is model and _RUN.hooks is not None:
        _RUN.hooks.__exit__(None, None, None)
        _RUN.model = _RUN.hooks = None


def _pack(saved: Tensor) -> _Kept:
    output, version = _OUTPUTS.get(saved, (None, 0))
    if output is not None and saved._version == version:
        return output
    return _Kept(saved, _version(saved))
