"""Reads a network's data flow by symbolic tracing: which activation follows each norm, and where it is called.

A module whose forward cannot be traced (control flow that depends on data) becomes opaque: it is a leaf in its
parent's graph, and its children are traced each by itself.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from proxynorm.nn.norm_act import NormAct2d

# Elementwise activations; sigmoids and softmaxes are left out, since after a norm they are gates.
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Tanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
)  # fmt: skip
_TIMM_ACTIVATIONS = {"Swish", "Mish", "HardSwish", "HardMish", "GELU", "GELUTanh", "QuickGELU", "Tanh", "PReLU"}
_GATES = {"Sigmoid", "Hardsigmoid", "HardSigmoid", "LogSigmoid", "Softmax", "Softmax2d"}

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
}
# Activations in disguise, of which no module can be made: convert refuses them rather than overlook them.
_DISGUISED = {"clamp", "clamp_", "clamp_min", "clamp_min_", "maximum", "threshold", "threshold_", "rrelu", "prelu"}
# What ends the search for an activation: from here on the value is another layer's.
_ARITHMETIC = {"add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "truediv", "div", "matmul", "bmm",
               "einsum", "linear", "conv2d", "mean", "sum"}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One activation call in the text of one module's forward.

    Attributes:
        caller: qualified name of the module whose forward makes the call.
        ordinal: which of that forward's activation calls it is, from 0.
        module: qualified name of the activation's module; None if it is a function.
    """

    caller: str
    ordinal: int
    module: str | None


@dataclass
class Follower:
    """What the value of one norm meets first.

    Attributes:
        activation: a module that computes the activation behind the norm; None if there is none.
        site: where that activation is called.
        between: qualified names of the modules between the norm and the activation (drop-block, blur).
        problem: why the norm cannot be placed; None if it can.
    """

    activation: nn.Module | None = None
    site: Site | None = None
    between: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass
class Part:
    """One traced graph: a whole model, or one of its largest traceable parts.

    Attributes:
        prefix: what stands before the graph's module names in the whole model ("" or "name.").
        root: the traced module.
        graph: its graph; names are counted from root.
        fixed: for each traced module, its forward's optional arguments that are no tensors, and their values.
    """

    prefix: str
    root: nn.Module
    graph: fx.Graph
    fixed: dict[str, dict[str, object]]


@dataclass
class Flow:
    """The calls of a network's norms and activations.

    Attributes:
        followers: for each norm, by its qualified name, what follows it at each of its calls.
        sites: every activation call.
        feeding: qualified names of the convolutions whose output reaches a norm, alone or in a sum.
        fixed: for each traced module, its forward's optional arguments that are no tensors, and their values.
    """

    followers: dict[str, list[Follower]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    feeding: set[str] = field(default_factory=set)
    fixed: dict[str, dict[str, object]] = field(default_factory=dict)


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalizes maps: batch norm, group norm, NormAct2d, or a channels-first layer norm."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, NormAct2d)):
        return True
    return isinstance(module, nn.LayerNorm) and "2d" in type(module).__name__


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an elementwise activation of torch or timm."""
    return isinstance(module, ACTIVATIONS) or (
        type(module).__module__.startswith("timm.layers.activations") and type(module).__name__ in _TIMM_ACTIVATIONS
    )


def may_stand_between(module: nn.Module) -> bool:
    """Whether the module may stand between a norm and its activation: it drops, blurs or pools and learns nothing."""
    name = type(module).__name__
    known = (nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d)
    return isinstance(module, known) or "DropBlock" in name or "BlurPool" in name


class FlowTracer(fx.Tracer):
    """Traces with norms and activations as leaves, and notes for each activation call the forward that makes it.

    Args:
        opaque: types of module not to look into.
        shallow: make every child a leaf, to trace the text of one forward alone.
    """

    def __init__(self, opaque: frozenset[type] = frozenset(), shallow: bool = False) -> None:
        super().__init__(autowrap_functions=_untraceable_functions())
        self.opaque = opaque
        self.shallow = shallow
        self.failed: nn.Module | None = None
        self.fixed: dict[str, dict[str, object]] = {}
        self._frames: list[list] = []

    def trace(self, root: nn.Module, concrete_args: dict | None = None) -> fx.Graph:
        """The graph of root, with meta["site"] on its activation calls; raises what root's forward raises."""
        self._frames = [["", 0]]
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Norms, activations, opaque types and what freeze knows are leaves, besides fx's own (torch.nn)."""
        special = is_norm(m) or is_activation(m) or may_stand_between(m) or hasattr(m, "frozen")
        return self.shallow or special or type(m) in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Keeps the stack of forwards, and the innermost module that failed."""
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        self._frames.append([self.path_of_module(m), 0])
        self.fixed[self._frames[-1][0]] = _fixed_arguments(m.forward, args, kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise
        finally:
            self._frames.pop()

    def create_node(self, kind: str, target: object, *args: object, **kwargs: object) -> fx.Node:
        """Numbers the activation calls of each forward."""
        node = super().create_node(kind, target, *args, **kwargs)
        if activation_of(node, self.root) is not None:
            frame = self._frames[-1]
            node.meta["site"] = Site(frame[0], frame[1], str(target) if kind == "call_module" else None)
            frame[1] += 1
        return node


def _untraceable_functions() -> tuple[Callable, ...]:
    """timm's list of functions that symbolic tracing must not enter, if timm is loaded."""
    timm_fx = sys.modules.get("timm.layers._fx")
    return tuple(f for f in timm_fx.get_notrace_functions() if callable(f)) if timm_fx else ()


def _untraceable_types() -> frozenset[type]:
    """timm's list of modules that symbolic tracing must not enter, if timm is loaded."""
    timm_fx = sys.modules.get("timm.layers._fx")
    return frozenset(timm_fx.get_notrace_modules()) if timm_fx else frozenset()


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
    return make(**{key: value for key, value in given.items() if key not in ("inplace", "input")})


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


def _writes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether an activation call overwrites its input."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    return str(called_function(node)).endswith("_") or bool(node.kwargs.get("inplace", False))


def follower(node: fx.Node, root: nn.Module) -> Follower:
    """What follows the norm that `node` calls: its activation, nothing, or a reason why it cannot be placed."""
    between: list[str] = []
    while True:
        users = list(node.users)
        for i, user in enumerate(users):
            if activation_of(user, root) is None:
                continue
            if len(users) > 1 and not (i == 0 and _writes_in_place(user, root)):
                return Follower(problem="its value feeds an activation and something else as well")
            return Follower(activation_of(user, root), user.meta["site"], between)
        step = root.get_submodule(str(users[0].target)) if len(users) == 1 and users[0].op == "call_module" else None
        if isinstance(step, nn.Identity):
            node = users[0]
        elif step is not None and may_stand_between(step) and not is_norm(step):
            between.append(str(users[0].target))
            node = users[0]
        else:
            return Follower(problem=_hidden_activation(node, root))


def _hidden_activation(node: fx.Node, root: nn.Module) -> str | None:
    """A problem if an activation stands behind operations that only reshape, pool or join; None if there is none."""
    todo, seen = [(user, []) for user in node.users], set()
    while todo:
        user, path = todo.pop()
        if user in seen:
            continue
        seen.add(user)
        name = str(called_function(user))
        if activation_of(user, root) is not None or name in _DISGUISED or _is_unknown_activation(user, root):
            through = f" behind {', '.join(path)}" if path else ""
            return f"the activation {user.target}{through} cannot be joined with it"
        if not _ends_search(user, root):
            todo += [(nxt, [*path, user.name]) for nxt in user.users]
    return None


def _is_unknown_activation(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node calls a module of torch.nn.modules.activation that is neither in ACTIVATIONS nor a gate."""
    if node.op != "call_module":
        return False
    kind = type(root.get_submodule(str(node.target)))
    return kind.__module__ == "torch.nn.modules.activation" and kind.__name__ not in {*_GATES, "MultiheadAttention"}


def _ends_search(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node computes a new value (or only asks a shape) rather than handing on, reshaped, pooled or joined,
    the one it got."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return any(True for _ in module.parameters()) or is_norm(module) or type(module).__name__ in _GATES
    return node.op in ("output", "get_attr") or node.target in (getattr, "size") or called_function(node) in _ARITHMETIC


def read_flow(model: nn.Module) -> Flow:
    """The data flow of a whole network, traced as in training (auxiliary heads included).

    Raises:
        nothing: what cannot be traced is simply not in the result.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        flow = Flow()
        for part in traced_parts(model):
            _collect(flow, part)
        return flow
    finally:
        for module, mode in modes.items():
            module.training = mode


def traced_parts(model: nn.Module) -> Iterator[Part]:
    """The whole model in its present mode, or its largest traceable parts."""
    todo, done = [("", model)], set()
    while todo:
        prefix, root = todo.pop()
        if root in done:
            continue
        done.add(root)
        graph, tracer = _trace(root)
        if graph is None:
            todo += [(f"{prefix}{name}.", child) for name, child in root.named_children()]
            continue
        yield Part(prefix, root, graph, tracer.fixed)
        for name, module in root.named_modules():
            if name and type(module) in tracer.opaque and not is_norm(module):
                todo += [(f"{prefix}{name}.{child_name}.", child) for child_name, child in module.named_children()]


def _trace(root: nn.Module) -> tuple[fx.Graph | None, FlowTracer]:
    """The graph of root with as few opaque types as tracing needs; None if root's own forward cannot be traced."""
    tracer = FlowTracer(_untraceable_types())
    while not (type(root) in tracer.opaque or is_norm(root) or is_activation(root)):
        try:
            fixed = _fixed_arguments(root.forward)
            graph = tracer.trace(root, fixed)
            tracer.fixed[""] = fixed
            return graph, tracer
        except Exception:
            tracer = FlowTracer(tracer.opaque | {type(tracer.failed or root)})
    return None, tracer


def _fixed_arguments(forward: Callable, args: tuple = (), kwargs: dict | None = None) -> dict[str, object]:
    """forward's optional arguments that are not given a traced value in this call, and what they are."""
    signature = inspect.signature(forward)
    given = signature.bind_partial(*args, **(kwargs or {})).arguments
    optional = {p.name: given.get(p.name, p.default) for p in signature.parameters.values() if p.default is not p.empty}
    return {name: value for name, value in optional.items() if not isinstance(value, (fx.Proxy, list, tuple))}


def _collect(flow: Flow, part: Part) -> None:
    """Adds one graph's norms and activation sites, under names of the whole model."""
    prefix, root = part.prefix, part.root
    flow.fixed |= {(prefix + name).rstrip("."): values for name, values in part.fixed.items()}
    for node in part.graph.nodes:
        if "site" in node.meta:
            flow.sites.append(_global_site(prefix, node.meta["site"]))
        if node.op == "call_module" and is_norm(root.get_submodule(str(node.target))):
            found = follower(node, root)
            if prefix and found.activation is None and found.problem is None and _leaves(node):
                found.problem = "its value leaves the part that can be traced"
            found.site = found.site and _global_site(prefix, found.site)
            found.between = [prefix + name for name in found.between]
            flow.followers.setdefault(prefix + str(node.target), []).append(found)
            flow.feeding |= {prefix + name for name in _convolutions_before(node, root)}


def _convolutions_before(norm: fx.Node, root: nn.Module) -> set[str]:
    """Names of the convolutions that reach a norm through sums, joins and pools only."""
    found, todo, seen = set(), [norm], {norm}
    while todo:
        for node in todo.pop().all_input_nodes:
            module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.modules.conv._ConvNd):
                found.add(str(node.target))
            elif node not in seen and not (module is not None and (is_norm(module) or is_activation(module))):
                todo.append(node)
            seen.add(node)
    return found


def _leaves(node: fx.Node) -> bool:
    """Whether the node's value is (part of) the graph's output."""
    return any(user.op == "output" for user in node.users)


def _global_site(prefix: str, site: Site) -> Site:
    """The site with its names counted from the whole model's root."""
    caller = (prefix + site.caller).rstrip(".")
    return Site(caller, site.ordinal, None if site.module is None else prefix + site.module)
