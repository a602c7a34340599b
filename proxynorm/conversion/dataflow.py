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

from torch import fx, nn

from proxynorm.conversion.elementwise import (
    activation_of,
    is_activation,
    is_gate,
    is_norm,
    try_modules,
)
from proxynorm.conversion.followers import Follower, Site, follower, is_overwritten
from proxynorm.conversion.linear import may_stand_between


@dataclass
class Part:
    """One traced graph: a whole model, or one of its largest traceable parts.

    Attributes:
        prefix: what stands before the graph's module names in the whole model ("" or "name.").
        root: the traced module.
        graph: its graph; names are counted from root.
        fixed: for each traced module, its forward's optional arguments that are no tensors, and their values.
        varied: the modules that are called with several values of these.
    """

    prefix: str
    root: nn.Module
    graph: fx.Graph
    fixed: dict[str, dict[str, object]]
    varied: set[str]


@dataclass
class Flow:
    """The calls of a network's norms and activations.

    Attributes:
        followers: for each norm, by its qualified name, what follows it at each of its calls.
        sites: every activation call.
        feeding: qualified names of the convolutions whose output reaches a norm, alone or in a sum.
        fixed: for each traced module, its forward's optional arguments that are no tensors, and their values.
        varied: the modules that are called with several values of these.
        evaluation: the same network's flow in evaluation; None in that flow itself.
    """

    followers: dict[str, list[Follower]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    feeding: set[str] = field(default_factory=set)
    fixed: dict[str, dict[str, object]] = field(default_factory=dict)
    varied: set[str] = field(default_factory=set)
    evaluation: Flow | None = None


class InPlaceProxy(fx.Proxy):
    """A traced value whose += and the like are told from + (fx's own proxy records either as +)."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


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
        self.varied: set[str] = set()
        self._frames: list[list] = []

    def trace(self, root: nn.Module, concrete_args: dict | None = None) -> fx.Graph:
        """The graph of root, with meta["site"] on its activation calls; raises what root's forward raises."""
        self._frames = [["", 0]]
        try_modules(root)
        return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """In-place sums are told apart where the graph is only read; in one that is to run, numbers may be summed."""
        return super().proxy(node) if self.shallow else InPlaceProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Norms, activations, opaque types and what freeze knows are leaves, besides fx's own (torch.nn)."""
        special = (
            is_norm(m)
            or is_activation(m)
            or is_gate(m)
            or may_stand_between(m)
            or hasattr(m, "frozen")
        )
        return (
            self.shallow
            or special
            or type(m) in self.opaque
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        """Keeps the stack of forwards, and the innermost module that failed."""
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        name, fixed = self.path_of_module(m), _fixed_arguments(m.forward, args, kwargs)
        self._frames.append([name, 0])
        if self.fixed.setdefault(name, fixed) != fixed:
            self.varied.add(name)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise
        finally:
            self._frames.pop()

    def create_node(self, kind: str, target: object, *args: object, **kwargs: object) -> fx.Node:
        """Notes whose forward makes each call, and numbers the activation calls of each forward."""
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["caller"] = self._frames[-1][0]
        if activation_of(node, self.root) is not None:
            frame = self._frames[-1]
            node.meta["site"] = Site(
                frame[0], frame[1], str(target) if kind == "call_module" else None
            )
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


def read_flow(model: nn.Module) -> Flow:
    """The data flow of a whole network, traced as in training (auxiliary heads included) and, apart, as in evaluation.

    Raises:
        nothing: what cannot be traced is simply not in the result.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        flow = _flow(model)
        model.eval()
        flow.evaluation = _flow(model)
        return flow
    finally:
        for module, mode in modes.items():
            module.training = mode


def _flow(model: nn.Module) -> Flow:
    """The data flow in the model's present mode."""
    flow = Flow()
    for part in traced_parts(model):
        _collect(flow, part)
    return flow


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
        yield Part(prefix, root, graph, tracer.fixed, tracer.varied)
        for name, module in root.named_modules():
            if name and type(module) in tracer.opaque and not is_norm(module):
                todo += [
                    (f"{prefix}{name}.{child_name}.", child)
                    for child_name, child in module.named_children()
                ]


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


def _fixed_arguments(
    forward: Callable, args: tuple = (), kwargs: dict | None = None
) -> dict[str, object]:
    """forward's optional arguments that are not given a traced value in this call, and what they are."""
    signature = inspect.signature(forward)
    given = signature.bind_partial(*args, **(kwargs or {})).arguments
    optional = {
        p.name: given.get(p.name, p.default)
        for p in signature.parameters.values()
        if p.default is not p.empty
    }
    return {
        name: value
        for name, value in optional.items()
        if not isinstance(value, (fx.Proxy, list, tuple))
    }


def _collect(flow: Flow, part: Part) -> None:
    """Adds one graph's norms and activation sites, under names of the whole model."""
    prefix, root = part.prefix, part.root
    flow.fixed |= {(prefix + name).rstrip("."): values for name, values in part.fixed.items()}
    flow.varied |= {prefix + name for name in part.varied}
    for node in part.graph.nodes:
        if "site" in node.meta:
            flow.sites.append(_global_site(prefix, node.meta["site"]))
        if node.op == "call_module" and is_norm(root.get_submodule(str(node.target))):
            found = follower(node, root)
            found.overwritten = is_overwritten(node, found.call or node, root)
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
            elif node not in seen and not (
                module is not None and (is_norm(module) or is_activation(module))
            ):
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
