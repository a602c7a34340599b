"""Activations: made from a name, class, module or callable, and recognized by canonical name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proxynorm.nn.checks import unknown_name

Activation = str | type | nn.Module | Callable[[Tensor], Tensor] | None

_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "hard_tanh": nn.Hardtanh,
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_swish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "mish": nn.Mish,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}
ACTIVATIONS: tuple[str, ...] = tuple(_LAYERS)
_SPELLINGS = {name.replace("_", ""): name for name in _LAYERS}
_SPELLINGS |= {"swish": "silu", "linear": "identity"}
# F.relu, F.relu_, torch.relu and so on, each with the name of its activation
_FUNCTIONS = {
    getattr(module, spelling): name
    for name in _LAYERS
    for spelled in (name, name.replace("_", ""))
    for spelling in (spelled, f"{spelled}_")
    for module in (F, torch)
    if hasattr(module, spelling)
}


class FunctionActivation(nn.Module):
    """An elementwise callable as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def make_activation(activation: Activation, **kwargs: object) -> nn.Module:
    """Make an activation module from a name, a module class, a module, or an elementwise callable.

    A class or callable may be wrapped in functools.partial; kwargs are passed to it. A module is
    returned unchanged. None gives the identity. Raises ValueError for an unknown name, and
    TypeError for anything else.
    """
    if activation is None or activation == "":
        return nn.Identity()
    if isinstance(activation, nn.Module):
        return activation
    if isinstance(activation, str):
        name = _SPELLINGS.get(activation.lower().replace("_", ""))
        if name is None:
            raise ValueError(unknown_name("activation", activation, ACTIVATIONS))
        return _LAYERS[name](**kwargs)
    given: Any = activation
    if isinstance(given, partial) and not given.args:
        given, kwargs = given.func, {**given.keywords, **kwargs}
    if given in _FUNCTIONS:
        return _LAYERS[_FUNCTIONS[given]](**kwargs)
    if isinstance(given.func if isinstance(given, partial) else given, type):
        return given(**kwargs)
    if callable(given):
        return FunctionActivation(partial(given, **kwargs) if kwargs else given)
    raise TypeError(
        f"an activation is a name, a module, a module class or a callable, not {activation!r}"
    )


def activate(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a module to x, with the module's parameters cast to x's dtype.

    x is float32 or better, but the parameters, such as PReLU's slopes, may be half precision.
    """
    parameters = dict(module.named_parameters())
    if all(p.dtype == x.dtype for p in parameters.values()):
        return module(x)
    cast = {name: p.to(x.dtype) for name, p in parameters.items()}
    return torch.func.functional_call(module, cast, (x,))


def out_of_place(module: nn.Module) -> nn.Module:
    """The module itself, or a copy with inplace=False if it works in place."""
    if getattr(module, "inplace", False):
        copied: Any = copy.copy(module)
        copied.inplace = False
        return copied
    return module


def activation_name(module: nn.Module) -> str:
    """The canonical name of torch's and timm's activation modules; "callable" for all others.

    The classes of both libraries are recognized by name: timm's Swish, HardSwishMe and so on
    compute the same as torch's. A class of the same name elsewhere may compute something else.
    """
    is_known = type(module).__module__.startswith(("torch.nn.", "timm.layers.activations"))
    name = class_name(module)
    return name if is_known and name in _LAYERS else "callable"


def class_name(module: nn.Module) -> str:
    """The name of the module's class, spelled as in ACTIVATIONS if it is one of them."""
    name = type(module).__name__.lower()
    name = _SPELLINGS.get(name.removesuffix("me"), name)  # timm's SwishMe: "memory efficient"
    is_tanh = name == "gelu" and getattr(module, "approximate", "none") == "tanh"
    return "gelu_tanh" if is_tanh else name
