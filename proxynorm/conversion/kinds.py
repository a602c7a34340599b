"""Tell norms, activations, gates and dropout apart: norms by class, most others by trial."""

from __future__ import annotations

import copy
import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn

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
_NORM_NAME = re.compile(r"Norm(Act)?(\d?d)?$")


def is_norm(module: nn.Module) -> bool:
    """Return whether convert can replace the module: one affine per channel, channels first."""
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, NormAct2d)
    name = type(module).__name__
    is_channels_first = isinstance(module, nn.LayerNorm) and "2d" in name
    # torchvision, timm and detectron2 each have a batch norm of constants
    return isinstance(module, kinds) or is_channels_first or name.startswith("FrozenBatchNorm")


def is_other_norm(module: nn.Module) -> bool:
    """True for a norm that convert does not replace, such as a layer norm over the last axis."""
    is_leaf = next(module.children(), None) is None and not type(module).__name__.startswith("_")
    return is_leaf and not is_norm(module) and bool(_NORM_NAME.search(type(module).__name__))


def own_activation(norm: nn.Module) -> nn.Module | None:
    """The activation inside of a norm+act layer; None if it has none."""
    act = getattr(norm, "act", None)
    return None if isinstance(act, nn.Identity) else act


def is_activation(module: nn.Module) -> bool:
    """Return whether the module acts on each element alone, and is neither linear nor a gate."""
    return kind_of(module) == "activation"


def kind_of(module: nn.Module) -> str | None:
    """The part that a module plays for a norm; None for one whose own calls have to be watched.

    "norm"; "activation"; "gate": gives numbers from 0 to 1, to multiply another value with;
    "between": drops, blurs or pools, and may stand between a norm and its activation.
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


def activation_of_call(
    name: str, args: tuple[Any, ...], kwargs: dict[str, object]
) -> nn.Module | None:
    """The activation that a call of a torch function computes, as a module; None if it is none."""
    kind = _FUNCTIONAL.get(name.replace("_", ""))
    if kind is None:
        return None
    options = {key: value for key, value in kwargs.items() if key not in ("inplace", "input")}
    try:
        module = kind(*args[1:], **options)
    except (TypeError, ValueError):  # some other use of the name
        return None
    return module if is_activation(module) else None


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
    x = torch.linspace(-8, 8, 120, device="cpu").view(2, 3, 4, 5)
    flipped = x.flip(0, 1, 2, 3)
    is_even = torch.arange(5, device="cpu") % 2 == 0
    try:
        y, y_flipped, y_mixed = (
            _run(module, v) for v in (x, flipped, torch.where(is_even, x, flipped))
        )
        if y.shape != x.shape or not y.isfinite().all():
            return None
    except Exception:  # a module that does not take maps is neither
        return None
    is_placeless = torch.allclose(y_flipped, y.flip(0, 1, 2, 3), atol=1e-5)
    is_elementwise = torch.allclose(y_mixed, torch.where(is_even, y, y_flipped), atol=1e-5)
    steps = y.flatten().double().diff()
    if not (is_placeless and is_elementwise and steps.max() - steps.min() >= 1e-3):
        return None
    return "gate" if y.min() >= 0 and y.max() <= 1 else "activation"


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a copy of the module to x in x's precision, without its hooks."""
    copied = copy.deepcopy(module).to(x.device, x.dtype)
    y: Tensor = copied.forward(x.clone())
    return y
