"""Recomputation: one map per layer is kept for backward instead of two.

Autograd keeps the input x of a NormAct2d's norm, and its output z for the convolution that follows.
In the forward pass of a recompute() model, saved-tensor hooks replace z by x and a function that
computes z from it, so backward computes one more norm and activation per layer. All other tensors
are kept as usual. Autograd does not notice in-place changes of tensors that hooks keep, so the
hooks check for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from proxynorm.nn.fast.precision import needs_plain_operations


def recompute(model: nn.Module) -> nn.Module:
    """Make model keep one map per NormAct2d layer with proxy instead of two; return the model.

    Results are the same. A second call has no effect, nor does recomputation under torch.compile,
    torch.func and tracing. Only the innermost saved-tensor hooks apply, so do not combine it with
    others on the same part of a network, such as gradient checkpointing with use_reentrant=False or
    save_on_cpu. Like autograd, it does not notice changes through .data.
    """
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)
    return model


class RebuiltOutput:
    """A layer's output, which backward computes again from the input, once for all its users."""

    def __init__(self, rebuild: Callable[[Tensor], Tensor]) -> None:
        self.rebuild = rebuild
        self.output: Tensor | None = None

    def replaces(self, z: Tensor, x: Tensor) -> None:
        """From now on, operations that would keep z keep this and x."""
        _OUTPUTS[z] = _Kept(x.detach(), _version(x), self), z._version

    def take(self, x: Tensor, last: bool = False) -> Tensor:
        """The output, computed at the first call and dropped at the last.

        last: in the layer's own backward pass, which comes after those of the layers that it feeds.
        """
        output = self.rebuild(x) if self.output is None else self.output
        self.output = None if last else output
        return output


class _Kept(NamedTuple):
    """A tensor that is kept for backward, and its version at that time.

    With `rebuilt`, it is a layer's input, kept in place of the output that is computed from it.
    """

    tensor: Tensor
    version: int
    rebuilt: RebuiltOutput | None = None

    def unpack(self) -> Tensor:
        """The tensor for backward. Raises RuntimeError, with torch's text, if it was changed."""
        tensor, version = self.tensor, self.version
        if _version(tensor) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: [{tensor.type()} {list(tensor.shape)}] is at version "
                f"{tensor._version}; expected version {version} instead. It was changed in place "
                "before backward: change a copy of it, or change it later."
            )
        if self.rebuilt is None:
            return tensor
        with torch.no_grad():
            return self.rebuilt.take(tensor)


class _Active(threading.local):
    """The model whose forward pass runs in this thread, and its saved-tensor hooks."""

    model: nn.Module | None = None
    hooks: saved_tensors_hooks | None = None


_ACTIVE = _Active()
# for each output that still exists: what is kept in its place, and the output's version
_OUTPUTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_recomputing() -> bool:
    """True in the forward pass of a recompute() model."""
    return _ACTIVE.hooks is not None


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _enter(model: nn.Module, inputs: tuple[object, ...]) -> None:
    _leave(model)  # after a keyboard interrupt, the last forward pass may have skipped it
    if _ACTIVE.hooks is None and torch.is_grad_enabled() and not needs_plain_operations():
        _ACTIVE.model, _ACTIVE.hooks = model, saved_tensors_hooks(_pack, lambda kept: kept.unpack())
        _ACTIVE.hooks.__enter__()


def _leave(model: nn.Module, inputs: object = None, output: object = None) -> None:
    if _ACTIVE.model is model and _ACTIVE.hooks is not None:
        _ACTIVE.hooks.__exit__(None, None, None)
        _ACTIVE.model = _ACTIVE.hooks = None


RECOMPUTE_HOOKS = (_enter, _leave)


def _pack(saved: Tensor) -> _Kept:
    output, version = _OUTPUTS.get(saved, (None, 0))
    if output is not None and saved._version == version:
        return output
    return _Kept(saved, _version(saved))
