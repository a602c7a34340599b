"""What the value of a norm meets in the data flow: its activation, a gate, nothing, or something that hinders."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from torch import fx, nn

from proxynorm.conversion.elementwise import (
    activation_of,
    called_function,
    is_activation,
    is_gate_call,
    is_norm,
    writes_in_place,
)
from proxynorm.conversion.linear import (
    PRODUCTS,
    QUOTIENTS,
    SUMS,
    arguments,
    asks_shape,
    begins_layer,
    inputs,
    is_linear,
    may_stand_between,
    plain_name,
)

# Functions whose result may share memory with their input; those of other libraries may as well.
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "contiguous",
    "getitem",
    "chunk",
    "split",
    "unbind",
    "to",
    "squeeze",
    "unsqueeze",
    "expand",
    "narrow",
    "type",
    "float",
    "dropout",
    "dropout2d",
    "pixel_shuffle",
}


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
        call: the node of the activation's call.
        overwritten: the value of the activation (the norm, where there is none) is later changed in place.
    """

    activation: nn.Module | None = None
    site: Site | None = None
    between: list[str] = field(default_factory=list)
    problem: str | None = None
    call: fx.Node | None = None
    overwritten: bool = False


def follower(node: fx.Node, root: nn.Module) -> Follower:
    """What follows the norm that `node` calls: its activation, nothing, or a reason why it cannot be placed."""
    if node.kwargs:
        return Follower(problem="it is called with its input as a keyword: pass the value alone")
    between: list[str] = []
    while True:
        users = list(node.users)
        for i, user in enumerate(users):
            if activation_of(user, root) is None:
                continue
            if len(users) > 1 and not (i == 0 and writes_in_place(user, root)):
                return Follower(problem="its value feeds an activation and something else as well")
            if any(_is_power(further, user) for further in user.users):
                return Follower(problem=_by_hand([*between, _told(user), "a power"], root, user))
            return Follower(activation_of(user, root), user.meta["site"], between, call=user)
        step = _called_module(users[0], root) if len(users) == 1 else None
        if isinstance(step, nn.Identity):
            node = users[0]
        elif step is not None and may_stand_between(step) and not is_norm(step):
            between.append(str(users[0].target))
            node = users[0]
        else:
            return Follower(problem=_hidden_activation(node, root))


def _called_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _told(node: fx.Node) -> str:
    """A call as a user knows it."""
    return (
        str(node.args[1])
        if node.target is getattr
        else getattr(node.target, "__name__", str(node.target))
    )


def _by_hand(path: list[str], root: nn.Module, node: fx.Node) -> str:
    """The problem of what may be an activation that is written out in a forward, by the calls that lead to it."""
    where = type(root.get_submodule(node.meta["caller"])).__name__
    return (
        f"an activation written by hand may stand behind it ({', '.join(path)}, in the forward of {where}), since "
        f"{path[-1]} is not known to be linear: make the activation a module of its own, like nn.SiLU"
    )


def _is_power(node: fx.Node, base: fx.Node) -> bool:
    """Whether a node is a power, or the product, of `base` with itself."""
    name = plain_name(node)
    return name in ("pow", "square") or (
        name in PRODUCTS | QUOTIENTS and len(arguments(node, {base})) > 1
    )


def _hidden_activation(norm: fx.Node, root: nn.Module) -> str | None:
    """A problem if something that is not known to be linear stands between the norm and the next layer or the sum or
    product with another value; None if there is none. A gate is none: a sigmoid that then multiplies another value."""
    paths: dict[fx.Node, list[str]] = {
        norm: []
    }  # the nodes that hand on the norm's value, and how they were reached
    alone, gates = (
        {norm},
        set(),
    )  # what depends on no other value of the data; of paths, what went through a sigmoid
    for node in norm.graph.nodes:
        sources = [source for source in inputs(node) if source in paths]
        pure = node.op != "placeholder" and alone.issuperset(inputs(node))
        if asks_shape(node) or (pure and not sources):
            alone.add(node)
        if not sources or asks_shape(node):
            continue
        path, gated = [*paths[sources[0]], _told(node)], bool(gates.intersection(sources))
        problem = _problem(node, root, paths, path)
        if problem is not None:
            return problem
        if not is_gate_call(node, root) and _ends_search(node, root, pure):
            if gated and not _applies_gate(node, root):
                return f"the sigmoid behind it ({', '.join(path[:-1])}) gates no other value"
            continue
        paths[node] = path
        gates |= {node} if gated or is_gate_call(node, root) else set()
        alone |= {node} if pure else set()
    return None


def _problem(
    node: fx.Node, root: nn.Module, values: Container[fx.Node], path: list[str]
) -> str | None:
    """Why a node that gets the norm's value hinders; None if it does not."""
    if activation_of(node, root) is not None or _is_unknown_activation(node, root):
        through = f" behind {', '.join(path[:-1])}" if path[:-1] else ""
        return f"the activation {_told(node)}{through} cannot be joined with it"
    known = node.op == "output" or is_gate_call(node, root) or begins_layer(node, root)
    if known or is_linear(node, root, values):
        return None
    module = _called_module(node, root)
    if module is not None:
        path = [*path[:-1], f"{path[-1]} ({type(module).__name__})"]
    return _by_hand(path, root, node)


def _is_unknown_activation(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node calls a module of torch.nn.modules.activation that is neither in ACTIVATIONS nor a gate."""
    module = _called_module(node, root)
    known = module is None or is_gate_call(node, root) or isinstance(module, nn.MultiheadAttention)
    return not known and type(module).__module__ == "torch.nn.modules.activation"


def _ends_search(node: fx.Node, root: nn.Module, pure: bool) -> bool:
    """Whether a node computes a new value rather than handing on, reshaped, pooled or joined, the one it got. Sums and
    products with constants hand on."""
    if node.op == "output" or begins_layer(node, root):
        return True
    return plain_name(node) in SUMS | PRODUCTS | QUOTIENTS and not pure


def _applies_gate(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node multiplies another value with what it got: elementwise, or as a matrix."""
    return plain_name(node) in PRODUCTS | QUOTIENTS or (
        node.op != "call_module" and begins_layer(node, root)
    )


def is_overwritten(norm: fx.Node, value: fx.Node, root: nn.Module) -> bool:
    """Whether what a converted layer will hand on (`value`: the call of its activation, or of the norm itself) is
    changed in place later, directly or through a view."""
    nodes = list(norm.graph.nodes)
    shared = {value}
    if value is not norm and writes_in_place(value, root):
        shared.add(value.args[0])
    for node in nodes[nodes.index(value) + 1 :]:
        if not node.args or node.args[0] not in shared:
            continue
        if writes_in_place(node, root):
            return True
        if _may_share_memory(node, root):
            shared.add(node)
    return False


def _may_share_memory(node: fx.Node, root: nn.Module) -> bool:
    """Whether the result of a call may be (a view of) its first argument."""
    module = _called_module(node, root)
    if module is not None:
        passing = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten)
        opaque = (
            not type(module).__module__.startswith("torch.nn.")
            and not is_norm(module)
            and not is_activation(module)
        )
        return isinstance(module, passing) or (opaque and next(module.parameters(), None) is None)
    name = called_function(node)
    return node.op in ("call_function", "call_method") and (name is None or name in _VIEWS)
