"""What counts as an activation: torch's and timm's by their classes, functions by name, users' modules by trial."""

from __future__ import annotations

import copy
import operator
import weakref

import torch
import torch.nn.functional as F
from torch import fx, nn

from proxynorm.nn.activations import ACTIVATIONS as NAMES
from proxynorm.nn.activations import activation_name, class_name, make_activation
from proxynorm.nn.norm_act import NormAct2d

# Elementwise activations; sigmoids and softmaxes are left out, since after a norm they are gates.
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Tanhshrink,
    nn.LogSigmoid,
    nn.Threshold,
)
_TIMM_ACTIVATIONS = {
    "Swish",
    "Mish",
    "HardSwish",
    "HardMish",
    "GELU",
    "GELUTanh",
    "QuickGELU",
    "Tanh",
    "PReLU",
}
_GATES = {"Sigmoid", "Hardsigmoid", "HardSigmoid", "Softmax", "Softmax2d"}
_GATE_FUNCTIONS = {"sigmoid", "sigmoid_", "hardsigmoid", "softmax"}

# Functional activations by name: the module that does the same, and the names of its further positional arguments.
_FUNCTIONAL = {
    "relu": (nn.ReLU, ()),
    "relu6": (nn.ReLU6, ()),
    "leaky_relu": (nn.LeakyReLU, ("negative_slope",)),
    "elu": (nn.ELU, ("alpha",)),
    "selu": (nn.SELU, ()),
    "celu": (nn.CELU, ("alpha",)),
    "gelu": (nn.GELU, ()),
    "silu": (nn.SiLU, ()),
    "mish": (nn.Mish, ()),
    "hardswish": (nn.Hardswish, ()),
    "hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "softplus": (nn.Softplus, ("beta", "threshold")),
    "softsign": (nn.Softsign, ()),
    "tanh": (nn.Tanh, ()),
    "log_sigmoid": (nn.LogSigmoid, ()),
    "tanhshrink": (nn.Tanhshrink, ()),
    "hardshrink": (nn.Hardshrink, ("lambd",)),
    "softshrink": (nn.Softshrink, ("lambd",)),
    "threshold": (nn.Threshold, ("threshold", "value")),
    "_threshold": (nn.Threshold, ("threshold", "value")),
}


def has_set_forward(module: nn.Module) -> bool:
    """Whether forward was set on this object: what its class says of it need not hold then."""
    return "forward" in vars(module)


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalizes maps: batch norm, group norm, NormAct2d, or a channels-first layer norm."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, NormAct2d)):
        return True
    return isinstance(module, nn.LayerNorm) and "2d" in type(module).__name__


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an elementwise activation: torch's, timm's, or any that behaves so on trial."""
    if isinstance(module, ACTIVATIONS) or (
        _is_timms(module) and type(module).__name__ in _TIMM_ACTIVATIONS
    ):
        return True
    return _tried(module) == "activation"


def is_gate(module: nn.Module) -> bool:
    """Whether the module gives numbers from 0 to 1, to multiply another value with."""
    return type(module).__name__ in _GATES or _tried(module) == "gate"


def _is_timms(module: nn.Module) -> bool:
    return type(module).__module__.startswith("timm.layers.activations")


_trials: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def try_modules(root: nn.Module) -> None:
    """Tries all modules of root. Must precede tracing, which lets no module compute numbers."""
    for module in root.modules():
        _tried(module)


def _tried(module: nn.Module) -> str | None:
    """What a module of the user's shows itself to be: an activation, a gate or neither."""
    if module not in _trials:
        _trials[module] = _try(module)
    return _trials[module]


def _try(module: nn.Module) -> str | None:
    """A module without tensors but single numbers is an activation if, run on a copy, each output depends on its own
    input alone, whatever its place, and is no linear function of it; a gate if it stays from 0 to 1 as well."""
    tensors = [*module.parameters(), *module.buffers()]
    if type(module).__module__.startswith("torch.nn.") or any(t.numel() > 1 for t in tensors):
        return None
    x = torch.linspace(-8, 8, 120, dtype=next((t.dtype for t in tensors), torch.float32)).view(
        2, 3, 4, 5
    )
    mixed = torch.where(torch.arange(5) % 2 == 0, x, x.flip(0, 1, 2, 3))
    try:
        y, flipped, both = _run(module, x), _run(module, x.flip(0, 1, 2, 3)), _run(module, mixed)
    except Exception:
        return None
    alike = (
        isinstance(y, torch.Tensor)
        and y.shape == x.shape
        and y.is_floating_point()
        and bool(y.isfinite().all())
    )
    if not (alike and torch.allclose(flipped, y.flip(0, 1, 2, 3), atol=1e-5)):
        return None
    steps = y.flatten().double().diff()
    alone = torch.allclose(both, torch.where(torch.arange(5) % 2 == 0, y, flipped), atol=1e-5)
    if not alone or steps.max() - steps.min() < 1e-3:
        return None
    return "gate" if y.min() >= 0 and y.max() <= 1 else "activation"


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a copy of the module makes of x; the copy's hooks are passed over, and x is left alone."""
    with torch.no_grad():
        return copy.deepcopy(module).forward(x.clone())


def recognized(activation: nn.Module) -> nn.Module:
    """The activation, or torch's own in place of a class of the same name that shows itself on trial to be the same."""
    name = class_name(activation)
    if (
        activation_name(activation) != "callable"
        or name not in NAMES
        or next(activation.parameters(), None) is not None
    ):
        return activation
    x, same = torch.linspace(-8, 8, 64), make_activation(name)
    return same if torch.allclose(_run(activation, x), same(x), atol=1e-5) else activation


def activation_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The activation that a node computes, as a module (built for a functional call); None if it is none."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return module if is_activation(module) else None
    name = called_function(node)
    if name is None or name.rstrip("_") not in _FUNCTIONAL:
        return None
    make, names = _FUNCTIONAL[name.rstrip("_")]
    given = dict(zip(names, node.args[1:])) | dict(node.kwargs)
    try:
        return make(
            **{key: value for key, value in given.items() if key not in ("inplace", "input")}
        )
    except TypeError:  # some other use of the name
        return None


def is_gate_call(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node computes a gate."""
    if node.op == "call_module":
        return is_gate(root.get_submodule(str(node.target)))
    return called_function(node) in _GATE_FUNCTIONS


def called_function(node: fx.Node) -> str | None:
    """Name of the torch function or tensor method that a node calls; None for other nodes and other libraries."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    homes = (torch, F, operator, torch.Tensor, torch._C._nn)
    known = any(getattr(home, name, None) is node.target for home in homes)
    return name if known else None


def writes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = str(called_function(node))
    augmented = node.op == "call_function" and name in _AUGMENTED
    return (
        augmented
        or (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace", False))
    )


_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ipow", "setitem"}
