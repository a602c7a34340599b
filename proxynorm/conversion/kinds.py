"""Classify modules and function calls by what they do to a norm's value: by name or by trial.

Modules are norms, activations, gates, or things like dropout. Calls are linear in the value, feed
it to a layer, combine it with another value, or may be an activation written by hand.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from proxynorm.nn.activations import ACTIVATIONS as NAMES
from proxynorm.nn.activations import activation_name, class_name, make_activation
from proxynorm.nn.norm_act import NormAct2d

# torch's activation modules by the names of their functions, such as leakyrelu for F.leaky_relu.
# Both take the same arguments in the same order.
_FUNCTIONAL = {
    name.lower(): kind
    for name, kind in vars(nn.modules.activation).items()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.PReLU
}

_SUMS = {"add", "sub", "subtract", "rsub", "radd", "sum", "mean"}
PRODUCTS = {"mul", "multiply", "rmul", "div", "divide", "true_divide", "truediv", "rdiv"}
POWERS = {"pow", "square", "rpow"}
_GATES = {"sigmoid", "hardsigmoid", "softmax"}
_LAYERS = {"linear", "bilinear", "matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "tensordot"}
_LAYERS |= {"scaled_dot_product_attention", "multi_head_attention_forward", "normalize"}
_LAYERS |= {"lstm", "gru"}
# Pools count as linear. So do means: behind some norms they are 0, so a trial would show nothing.
_POOLS = ("max_pool", "avg_pool", "dropout")
_EXTREMES = {"amax", "amin", "max", "min"}
# Functions whose results depend on the shape alone, or are only used in checks.
NO_VALUES = ("empty_like", "new_", "rand_like", "randn_like", "isnan", "isinf", "isfinite")


class Call(NamedTuple):
    """A call of a torch function."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The function's name without the marks of operators and in-place variants (__iadd__)."""
        name: str = getattr(self.function, "__name__", "").strip("_")
        return name[1:] if name[1:] in _SUMS | PRODUCTS | POWERS else name


def tensors_in(values: object) -> list[Tensor]:
    """All tensors of nested arguments or outputs."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def is_norm(module: nn.Module) -> bool:
    """True for a norm that convert can replace: channels first, with an affine per channel."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, NormAct2d)
    name = type(module).__name__
    is_channels_first = isinstance(module, nn.LayerNorm) and "2d" in name
    # torchvision, timm and detectron2 each have a FrozenBatchNorm2d
    return isinstance(module, kinds) or is_channels_first or name.startswith("FrozenBatchNorm")


def is_other_norm(module: nn.Module) -> bool:
    """True for a norm that convert does not replace, such as a layer norm over the last axis."""
    name = type(module).__name__
    is_leaf = next(module.children(), None) is None and not name.startswith("_")
    return is_leaf and not is_norm(module) and bool(re.search(r"Norm(Act)?(\d?d)?$", name))


def own_activation(norm: nn.Module) -> nn.Module | None:
    """The activation inside a norm+act layer; None if there is none."""
    act = getattr(norm, "act", None)
    return None if isinstance(act, nn.Identity) else act


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module; None for a module whose own calls have to be observed.

    - "norm"
    - "activation": acts on each element alone, and is neither linear nor a gate.
    - "gate": an elementwise function with values from 0 to 1, which multiply another value.
    - "between": drops, blurs or pools values; may come between a norm and its activation.
    """
    name = type(module).__name__
    if is_norm(module):
        return "norm"
    # a trial would take Hardtanh(0, 1) for a gate, and a PReLU may have a slope per channel
    if isinstance(module, (nn.PReLU, nn.Hardtanh)):
        return "activation"
    pools = (nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d)
    if isinstance(module, pools) or "DropBlock" in name or "BlurPool" in name:
        return "between"
    if module not in _tried:
        _tried[module] = _try(module)
    return _tried[module]


def activation_of_call(call: Call) -> nn.Module | None:
    """The activation that a call computes, as a module; None if it computes none."""
    kind = _FUNCTIONAL.get(call.name.replace("_", ""))
    if kind is None:
        return None
    options = {key: value for key, value in call.kwargs.items() if key not in ("inplace", "input")}
    try:
        module = kind(*call.args[1:], **options)
    except (TypeError, ValueError):  # another function of the same name
        return None
    return module if kind_of(module) == "activation" else None


def recognized(activation: nn.Module) -> nn.Module:
    """The activation, or torch's module of the same class name if both compute the same.

    The moments of torch's own activations have closed forms.
    """
    name = class_name(activation)
    has_parameters = next(activation.parameters(), None) is not None
    if activation_name(activation) != "callable" or name not in NAMES or has_parameters:
        return activation
    x, same = torch.linspace(-8, 8, 64, device="cpu"), make_activation(name)
    return same if torch.allclose(_run(activation, x), same(x), atol=1e-5) else activation


_tried: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def _try(module: nn.Module) -> str | None:
    """Try a copy of a module; return "activation", "gate" or None.

    A module without tensors other than single numbers is an activation if it acts on each element
    alone, regardless of its position, and is not linear. If its outputs also lie between 0 and 1,
    it is a gate.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if isinstance(module, nn.Sequential) or any(t.numel() > 1 for t in tensors):
        return None
    x = torch.linspace(-8, 8, 120, device="cpu")
    # The same values at other positions and with another mean: some are repeated, others missing.
    moved = torch.arange(120, device="cpu").square() % 97
    try:
        y, y_moved = (_run(module, v.view(2, 3, 4, 5)).flatten() for v in (x, x[moved]))
        is_elementwise = y.shape == x.shape and torch.allclose(y_moved, y[moved], atol=1e-5)
    except Exception:  # the module does not take a map, or does not return one
        return None
    steps = y.double().diff()
    if not (is_elementwise and steps.max() - steps.min() >= 1e-3):  # or linear, or not finite
        return None
    return "gate" if y.min() >= 0 and y.max() <= 1 else "activation"


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a copy of the module, in x's dtype and without hooks, to x."""
    copied = copy.deepcopy(module).to(x.device, x.dtype)
    y: Tensor = copied.forward(x.clone())
    return y


def effect(call: Call, on: Collection[Tensor], is_alone: bool) -> str:
    """The effect of a call on a value, which the tensors `on` among its arguments hold.

    - "layer": the value is the input of a convolution, linear layer, attention or norm.
    - "sum", "product": it is combined with another value.
    - "gate": it is mapped to numbers from 0 to 1.
    - "linear": it is scaled, shifted, moved or pooled.
    - "none": the result does not depend on it (a dropped branch).
    - "leaves": the result is no tensor.
    - "other": anything else, perhaps an activation.

    is_alone: no tensor of the call depends on other data.
    """
    name = call.name
    if name in _LAYERS or name.startswith("conv") or name.endswith("_norm"):
        return "layer"
    if name in _GATES:
        return "gate"
    # torch.max(y, other) is not a pool but an elementwise function
    is_extreme = name in _EXTREMES and len(tensors_in(call.args)) == 1
    is_mean = is_alone and name in ("sum", "mean")
    if is_extreme or is_mean or any(pool in name for pool in _POOLS):
        return "linear"
    depends = _dependence(call, {id(t) for t in on})
    if depends != "other" and not is_alone and name in _SUMS | PRODUCTS:
        return "sum" if name in _SUMS else "product"
    return depends


@torch.no_grad()
def _dependence(call: Call, on: set[int]) -> str:
    """How a call depends on the tensors with these ids: one of the last four words of `effect`.

    The call is repeated to get f(0), f(y) and f(−100y). If f is affine, they lie on a line. A y of
    zeros, as from a norm whose weight starts at 0, is replaced by ones, because it would show no
    dependence.
    """

    def scaled(factor: float) -> list[Tensor]:
        def scale(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in on:
                return value.detach().clone()
            return (value.detach() if value.any() else torch.ones_like(value)) * factor

        new_args, new_kwargs = tree_map(scale, (call.args, call.kwargs))
        output = call.function(*new_args, **new_kwargs)
        # a call that returns None, such as y[i] = z, changes its first argument
        return tensors_in(output if output is not None else new_args[:1])

    try:
        zero, one, far = (scaled(factor) for factor in (0.0, 1.0, -100.0))
    except (RuntimeError, TypeError):
        return "other"
    if not one:
        return "leaves"
    if all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(zero, one, far)):
        return "none"
    if not all(t.is_floating_point() or t.is_complex() for t in one):
        return "other"
    return "linear" if all(map(_on_one_line, zero, one, far)) else "other"


def _on_one_line(zero: Tensor, one: Tensor, far: Tensor) -> bool:
    """True if f(0), f(y) and f(−100y) are those of an affine f, up to rounding."""
    step, eps = one - zero, torch.finfo(one.dtype).eps
    # y may contribute little to f, as with a layer scale of 1e-5; then f's rounding matters
    bound = (eps**0.5 * step.abs().max()).maximum(16 * eps * one.abs().max()).clamp_min(1e-30)
    # strict, so that an infinite step is not taken for affine
    return bool(((far - zero + 100 * step).abs() < 100 * bound).all())
