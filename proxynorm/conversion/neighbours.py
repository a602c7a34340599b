"""What stands around each norm in a network's data flow, into which freeze may merge constants.

Nothing is merged into or across a module with hooks, nor into one that is called twice, registered under two names or
whose weight the model reads elsewhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

from proxynorm.conversion.dataflow import Part, traced_parts
from proxynorm.conversion.elementwise import called_function, has_set_forward
from proxynorm.nn.norm_act import NormAct2d


@dataclass
class Neighbours:
    """What stands around one norm in the data flow.

    Attributes:
        before: the convolution whose value goes into this norm alone; None if there is none such.
        after: the layers, each called once, that take the norm's value (pooled or not); None if others do too.
        gate: the only one that takes it, if it is a module that can apply PN's constants itself.
    """

    before: nn.Conv2d | None = None
    after: list[nn.Conv2d | nn.Linear] | None = None
    gate: str | None = None


def find_neighbours(model: nn.Module) -> dict[str, Neighbours]:
    """What stands around each norm that is used once and has no hooks, by the norm's qualified name."""
    parts = list(traced_parts(model))
    uses, found = _uses(model, parts), {}
    for part in parts:
        if part.prefix:  # a forward around it that cannot be read may call its layers one by one
            continue
        for node in part.graph.nodes:
            module = _called_module(node, part.root)
            if isinstance(module, NormAct2d) and uses[module] == 1:
                found[str(node.target)] = _around(node, part.root, uses)
    return found


def _uses(model: nn.Module, parts: list[Part]) -> Counter:
    """How often each module is called or one of its parameters read; more than once too for a module that has
    several names or hooks."""
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    uses = Counter({module: count - 1 + has_hooks(module) for module, count in names.items()})
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    for part in parts:
        parameters = dict(part.root.named_parameters(remove_duplicate=False))
        for node in part.graph.nodes:
            if node.op == "get_attr":
                uses.update(owners.get(parameters.get(str(node.target)), ()))
            elif node.op == "call_module":
                uses[part.root.get_submodule(str(node.target))] += 1
    return uses


def _called_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls; None for other nodes."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _around(node: fx.Node, root: nn.Module, uses: Counter) -> Neighbours:
    """The neighbours of the norm that `node` calls."""
    around = Neighbours(after=_takers(node, root, uses))
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and len(source.users) == 1:
        module = _called_module(source, root)
        around.before = module if type(module) is nn.Conv2d and uses[module] == 1 else None
    gate = _single_user(node, root)
    if (
        gate is not None
        and hasattr(root.get_submodule(gate), "frozen")
        and uses[root.get_submodule(gate)] == 1
    ):
        around.gate = gate
    return around


def _single_user(node: fx.Node, root: nn.Module) -> str | None:
    """Name of the module that alone takes the node's value, identities left out; None if there is none such."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = _called_module(node, root)
        if module is None or has_hooks(module):
            return None
        if not isinstance(module, nn.Identity):
            return str(node.target)
    return None


def _takers(node: fx.Node, root: nn.Module, uses: Counter) -> list[nn.Conv2d | nn.Linear] | None:
    """The convolutions and linear layers that take a norm's value, directly or pooled; None if anything else does."""
    channels = root.get_submodule(str(node.target)).num_features
    takers, todo = [], [(user, False) for user in node.users]
    while todo:
        user, is_flat = todo.pop()  # flat: (N, C), no map any more
        module = _called_module(user, root)
        if module is not None and has_hooks(module):
            return None
        if _flattens(user, module) and not is_flat:
            todo += [(further, True) for further in user.users]
        elif _hands_on(user, module, is_flat):
            todo += [(further, is_flat) for further in user.users]
        elif (
            _takes(module, channels, is_flat)
            and uses[module] == 1
            and len(user.all_input_nodes) == 1
        ):
            takers.append(module)
        else:
            return None
    return takers or None


def _takes(module: nn.Module | None, channels: int, is_flat: bool) -> bool:
    """Whether a layer is linear in each of that many input channels. A subclass may do more than its class."""
    if type(module) is nn.Conv2d:
        return not is_flat and module.in_channels == channels and module.padding_mode == "zeros"
    return is_flat and type(module) is nn.Linear and module.in_features == channels


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node makes (N, C) of a map of one position, or the mean of a map's positions."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    name, given = (
        called_function(node),
        dict(zip(("input", "a", "b"), node.args)) | dict(node.kwargs),
    )
    if name == "flatten":
        return (
            given.get("a", given.get("start_dim", 0)),
            given.get("b", given.get("end_dim", -1)),
        ) == (1, -1)
    return (
        name == "mean"
        and _averages_positions(node)
        and not given.get("b", given.get("keepdim", False))
    )


def _averages_positions(node: fx.Node) -> bool:
    """Whether a mean is one over height and width."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (list, tuple)) and sorted(d % 4 for d in dims) == [2, 3]


def _hands_on(node: fx.Node, module: nn.Module | None, is_flat: bool) -> bool:
    """Whether a node commutes with a constant affine (of positive scale) per channel: average and max pooling.
    A subclass may do more than its class: timm's average pools that pad do."""
    name = called_function(node)
    if idles(module) or (name == "dropout" and not node.kwargs.get("training", True)):
        return True
    if is_flat:
        return False
    if type(module) is nn.AvgPool2d:
        return module.divisor_override is None and (
            module.padding in (0, (0, 0)) or not module.count_include_pad
        )
    if module is not None:
        return type(module) in (nn.AdaptiveAvgPool2d, nn.MaxPool2d)
    return name == "adaptive_avg_pool2d" or (name == "mean" and _averages_positions(node))


def idles(module: nn.Module | None) -> bool:
    """Whether a module does nothing in evaluation. A subclass may: Monte Carlo dropout is one."""
    kind = type(module)
    is_timms = kind.__module__.startswith("timm.") and "DropBlock" in kind.__name__
    return kind in (nn.Identity, nn.Dropout, nn.Dropout2d) or is_timms


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: hooks, or a forward set on the object."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or has_set_forward(module)
