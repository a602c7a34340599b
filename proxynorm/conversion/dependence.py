"""Tell what a call of a torch function does to a norm's value: by its name, or else by trial."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_SUMS = {"add", "sub", "subtract", "rsub", "radd", "sum", "mean"}
_PRODUCTS = {"mul", "multiply", "rmul", "div", "divide", "true_divide", "truediv", "rdiv"}
_POWERS = {"pow", "square", "rpow"}
_GATES = {"sigmoid", "hardsigmoid", "softmax"}
_LAYERS = {"linear", "bilinear", "matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "tensordot"}
_LAYERS |= {"scaled_dot_product_attention", "multi_head_attention_forward", "normalize"}
_LAYERS |= {"lstm", "gru"}
# Pools are taken for linear. So are means, which vanish behind some norms: there is nothing to try.
_POOLS = ("max_pool", "avg_pool", "dropout")
_EXTREMES = {"amax", "amin", "max", "min"}
# Their results tell the shape alone, or are for checks.
_NO_VALUES = ("empty_like", "new_", "rand_like", "randn_like", "isnan", "isinf", "isfinite")


def plain_name(func: object) -> str:
    """A torch function's name, without the marks of operators and of in-place variants."""
    name: str = getattr(func, "__name__", "").strip("_")
    return name[1:] if name[1:] in _SUMS | _PRODUCTS | _POWERS else name


def holds_no_value(name: str) -> bool:
    """True for functions whose result does not hold the values of their arguments."""
    return name.startswith(_NO_VALUES)


def is_power(name: str, factors: int) -> bool:
    """True for powers, and for the product of one value with itself, held by so many tensors."""
    return name in _POWERS or (name in _PRODUCTS and factors > 1)


def effect(
    name: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    on: Collection[Tensor],
    is_alone: bool,
) -> str:
    """The effect of a call on the value that some of its tensors hold.

    "layer": it feeds a convolution, a linear layer, attention or a norm; "sum" or "product": it is
    joined with another value; "gate": it becomes a number from 0 to 1; "linear": scaled, moved,
    pooled; "none": the result does not depend on it; "other": an activation, perhaps.

    Args:
        on: the tensors that hold the value.
        is_alone: no tensor of the call depends on other data.
    """
    if name in _LAYERS or name.startswith("conv") or name.endswith("_norm"):
        return "layer"
    if name in _GATES:
        return "gate"
    # torch.max(y, other) is no pool but a curve
    is_extreme = name in _EXTREMES and len(tensors_in(args)) == 1
    is_mean = is_alone and name in ("sum", "mean")
    if is_extreme or is_mean or any(pool in name for pool in _POOLS):
        return "linear"
    depends = dependence(func, args, kwargs, on)
    if depends != "other" and not is_alone and name in _SUMS | _PRODUCTS:
        return "sum" if name in _SUMS else "product"
    return depends


def tensors_in(values: object) -> list[Tensor]:
    """All tensors of nested arguments or outputs."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@torch.no_grad()
def dependence(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], on: Collection[Tensor]
) -> str:
    """How a call depends on some of its tensors: "linear" (or affine), "none", or "other".

    f(0), f(y) and f(−100y) tell: for an affine f they lie on one line.
    """
    ids = {id(t) for t in on}

    def scaled(factor: float) -> list[Tensor]:
        def scale(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return value.detach() * factor if id(value) in ids else value.detach().clone()

        new_args, new_kwargs = tree_map(scale, (args, kwargs))
        output = func(*new_args, **new_kwargs)
        # a call without a result, such as y[i] = z, changes its first argument
        return tensors_in(output if output is not None else new_args[:1])

    try:
        if not all(t.is_floating_point() for t in on):
            return "other"
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
