"""Tell what modules and calls of functions do to a norm's value: by class or name, or by trial.

Modules are norms, activations, gates or dropout; calls are linear in the value, feed a layer, join
it with another value, or may be activations written by hand.
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

# F.leaky_relu and its like by the name of the module that does the same: both take the same
# arguments in one order.
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
# Pools are taken for linear. So are means, which vanish behind some norms: there is nothing to try.
_POOLS = ("max_pool", "avg_pool", "dropout")
_EXTREMES = {"amax", "amin", "max", "min"}
# Functions whose results tell the shape alone, or are for checks.
NO_VALUES = ("empty_like", "new_", "rand_like", "randn_like", "isnan", "isinf", "isfinite")


class Call(NamedTuple):
    """A call of a torch function."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The function's name, without the marks of operators and of in-place variants."""
        name: str = getattr(self.function, "__name__", "").strip("_")
        return name[1:] if name[1:] in _SUMS | PRODUCTS | POWERS else name


def tensors_in(values: object) -> list[Tensor]:
    """All tensors of nested arguments or outputs."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def is_norm(module: nn.Module) -> bool:
    """True for what convert can replace: a norm with one affine per channel, channels first."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, NormAct2d)
    name = type(module).__name__
    is_channels_first = isinstance(module, nn.LayerNorm) and "2d" in name
    # torchvision, timm and detectron2 each have a batch norm of constants
    return isinstance(module, kinds) or is_channels_first or name.startswith("FrozenBatchNorm")


def is_other_norm(module: nn.Module) -> bool:
    """True for a norm that convert does not replace, such as a layer norm over the last axis."""
    name = type(module).__name__
    is_leaf = next(module.children(), None) is None and not name.startswith("_")
    return is_leaf and not is_norm(module) and bool(re.search(r"Norm(Act)?(\d?d)?$", name))


def own_activation(norm: nn.Module) -> nn.Module | None:
    """The activation inside of a norm+act layer; None if it has none."""
    act = getattr(norm, "act", None)
    return None if isinstance(act, nn.Identity) else act


def kind_of(module: nn.Module) -> str | None:
    """The part that a module plays for a norm; None for one whose own calls have to be watched.

    "norm"; "activation": acts on each element alone, and is neither linear nor a gate; "gate":
    gives numbers from 0 to 1, to multiply another value with; "between": drops, blurs or pools, and
    may stand between a norm and its activation.
    """
    name = type(module).__name__
    if is_norm(module):
        return "norm"
    # Hardtanh(0, 1) looks like a gate; PReLU may have a slope per channel
    if isinstance(module, (nn.PReLU, nn.Hardtanh)):
        return "activation"
    pools = (nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d)
    if isinstance(module, pools) or "DropBlock" in name or "BlurPool" in name:
        return "between"
    if module not in _tried:
        _tried[module] = _try(module)
    return _tried[module]


def activation_of_call(call: Call) -> nn.Module | None:
    """The activation that a call computes, as a module; None if it is none."""
    kind = _FUNCTIONAL.get(call.name.replace("_", ""))
    if kind is None:
        return None
    options = {key: value for key, value in call.kwargs.items() if key not in ("inplace", "input")}
    try:
        module = kind(*call.args[1:], **options)
    except (TypeError, ValueError):  # some other use of the name
        return None
    return module if kind_of(module) == "activation" else None


def recognized(activation: nn.Module) -> nn.Module:
    """The activation, or torch's own of the same class name if both compute the same.

    torch's own has closed-form moments.
    """
    name = class_name(activation)
    has_parameters = next(activation.parameters(), None) is not None
    if activation_name(activation) != "callable" or name not in NAMES or has_parameters:
        return activation
    x, same = torch.linspace(-8, 8, 64, device="cpu"), make_activation(name)
    return same if torch.allclose(_run(activation, x), same(x), atol=1e-5) else activation


_tried: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def _try(module: nn.Module) -> str | None:
    """Run a copy of a module; return "activation", "gate" or None.

    A module that keeps no tensors but single numbers is an activation if each output depends on its
    own input alone, wherever it stands, and is no linear function of it; a gate if it stays from 0
    to 1 as well.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if isinstance(module, nn.Sequential) or any(t.numel() > 1 for t in tensors):
        return None
    x = torch.linspace(-8, 8, 120, device="cpu")
    # other places, and other means: some values come more than once, others not at all
    moved = torch.arange(120, device="cpu").square() % 97
    try:
        y, y_moved = (_run(module, v.view(2, 3, 4, 5)).flatten() for v in (x, x[moved]))
        is_elementwise = y.shape == x.shape and torch.allclose(y_moved, y[moved], atol=1e-5)
    except Exception:  # a module that does not take maps, or does not return one, is neither
        return None
    steps = y.double().diff()
    if not (is_elementwise and steps.max() - steps.min() >= 1e-3):  # or linear, or not finite
        return None
    return "gate" if y.min() >= 0 and y.max() <= 1 else "activation"


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a copy of the module to x in x's precision, without its hooks."""
    copied = copy.deepcopy(module).to(x.device, x.dtype)
    y: Tensor = copied.forward(x.clone())
    return y


def effect(call: Call, on: Collection[Tensor], is_alone: bool) -> str:
    """The effect of a call on the value that some of its tensors, `on`, hold.

    "layer": it feeds a convolution, a linear layer, attention or a norm; "sum" or "product": it is
    joined with another value; "gate": it becomes a number from 0 to 1; "linear": scaled, moved,
    pooled; "none": the result does not depend on it; "other": an activation, perhaps. is_alone: no
    tensor of the call depends on other data.
    """
    name = call.name
    if name in _LAYERS or name.startswith("conv") or name.endswith("_norm"):
        return "layer"
    if name in _GATES:
        return "gate"
    # torch.max(y, other) is no pool but a curve
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
    """How a call depends on the tensors of these ids: "linear" (or affine), "none", or "other".

    f(0), f(y) and f(−100y) tell: for an affine f they lie on one line.
    """

    def scaled(factor: float) -> list[Tensor]:
        def scale(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return value.detach() * factor if id(value) in on else value.detach().clone()

        new_args, new_kwargs = tree_map(scale, (call.args, call.kwargs))
        output = call.function(*new_args, **new_kwargs)
        # a call without a result, such as y[i] = z, changes its first argument
        return tensors_in(output if output is not None else new_args[:1])

    try:
        zero, one, far = (scaled(factor) for factor in (0.0, 1.0, -100.0))
    except (RuntimeError, TypeError):
        return "other"
    if all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(zero, one, far)):
        return "none"
    if not all(t.is_floating_point() or t.is_complex() for t in one):
        return "other"
    return "linear" if all(map(_on_one_line, zero, one, far)) else "other"


def _on_one_line(zero: Tensor, one: Tensor, far: Tensor) -> bool:
    """Return whether f(0), f(y) and f(−100y) are those of an affine f, to rounding."""
    step, eps = one - zero, torch.finfo(one.dtype).eps
    # y may be a small part of f, as behind a layer scale of 1e-5: then f's own rounding counts
    bound = (eps**0.5 * step.abs().max()).maximum(16 * eps * one.abs().max()).clamp_min(1e-30)
    # not ≤: a step to infinity lies on no line
    return bool(((far - zero + 100 * step).abs() < 100 * bound).all())
