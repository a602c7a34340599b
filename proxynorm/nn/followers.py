"""What the value of a norm meets in the data flow: its activation, a gate, nothing, or something that hinders."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from proxynorm.nn.elementwise import (
    activation_of,
    called_function,
    is_activation,
    is_gate_call,
    is_norm,
    writes_in_place,
)

# Activations in disguise, of which no module can be made: convert refuses them rather than overlook them.
_DISGUISED = {"clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max", "maximum", "minimum", "fmax",
              "fmin", "rrelu", "prelu"}  # fmt: skip
# Parts of activations written by hand: not linear in their one input.
_CURVED = {"where", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logit", "sqrt", "rsqrt", "reciprocal", "pow",
           "square", "abs", "sign", "gt", "lt", "ge", "le", "erf", "erfc", "erfinv", "sin", "cos", "tan", "asin", "acos",
           "atan", "arcsin", "arccos", "arctan", "atan2", "arctan2", "sinh", "cosh", "asinh", "acosh", "atanh", "arcsinh",
           "arccosh", "arctanh", "sinc", "hypot", "logaddexp", "logaddexp2", "logsumexp", "logsigmoid", "heaviside",
           "masked_fill", "masked_fill_", "mod", "fmod", "remainder", "floordiv", "floor_divide", "round", "floor", "ceil",
           "trunc", "fix", "frac", "nan_to_num", "addcmul", "addcdiv"}  # fmt: skip
_QUOTIENTS = {"truediv", "itruediv", "div", "div_", "divide", "true_divide"}
_SUMS = {"add", "iadd", "add_", "sub", "isub", "sub_", "rsub"}
_PRODUCTS = {"mul", "imul", "mul_", "truediv", "itruediv", "div", "div_"}
# What ends the search for an activation: from here on the value is another layer's.
_MIXING = {"matmul", "bmm", "einsum", "linear", "conv2d", "mean", "sum"}
# Functions whose result may share memory with their input; those of other libraries may as well.
_VIEWS = {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "getitem", "chunk", "split", "unbind", "to",
          "squeeze", "unsqueeze", "expand", "narrow", "type", "float", "dropout", "dropout2d", "pixel_shuffle"}  # fmt: skip


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


def may_stand_between(module: nn.Module) -> bool:
    """Whether the module may stand between a norm and its activation: it drops, blurs or pools and learns nothing."""
    name = type(module).__name__
    known = (nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d)
    return isinstance(module, known) or "DropBlock" in name or "BlurPool" in name


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
                return Follower(problem=_by_hand([*between, _told(user), "a power"]))
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
    return getattr(node.target, "__name__", str(node.target))


def _by_hand(path: list[str]) -> str:
    """The problem of an activation that is written out in a forward."""
    return (
        f"an activation written by hand stands behind it ({', '.join(path)}): make it a module of its own, like nn.SiLU"
    )


def _is_power(node: fx.Node, base: fx.Node) -> bool:
    """Whether a node is a power, or the product, of `base` with itself."""
    name = called_function(node)
    return name in ("pow", "square", "pow_", "square_") or (name in _PRODUCTS and node.args[:2] == (base, base))


def _hidden_activation(norm: fx.Node, root: nn.Module) -> str | None:
    """A problem if an activation stands behind operations that only reshape, pool, join, or calculate with the norm's
    value alone; None if there is none. A gate is none: a sigmoid that then multiplies another value."""
    paths: dict[fx.Node, list[str]] = {norm: []}  # the nodes that hand on the norm's value, and how they were reached
    alone, gates = {norm}, set()  # of these, what depends on no other value, and what went through a sigmoid
    for node in list(norm.graph.nodes):
        sources = [source for source in node.all_input_nodes if source in paths]
        if not sources or node in paths:
            continue
        path, pure = paths[sources[0]], alone.issuperset(node.all_input_nodes)
        problem = _problem(node, root, path, pure)
        if problem is not None:
            return problem
        if is_gate_call(node, root):
            gates.add(node)
        elif _ends_search(node, root, pure):
            if gates.intersection(sources) and not _applies_gate(node):
                return f"the sigmoid behind it ({', '.join([*path, node.name])}) gates no other value"
            continue
        paths[node] = [*path, node.name]
        gates |= {node} if gates.intersection(sources) else set()
        alone |= {node} if pure else set()
    return None


def _problem(node: fx.Node, root: nn.Module, path: list[str], pure: bool) -> str | None:
    """Why a node that gets the norm's value hinders; None if it does not."""
    name = str(called_function(node))
    disguised = name in _DISGUISED or (name in ("max", "min") and len(node.all_input_nodes) > 1)
    if activation_of(node, root) is not None or disguised or _is_unknown_activation(node, root):
        through = f" behind {', '.join(path)}" if path else ""
        return f"the activation {_told(node)}{through} cannot be joined with it"
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    divides = name in _QUOTIENTS and len(node.args) > 1 and isinstance(node.args[1], fx.Node)
    if pure and (name in _CURVED or divides or (name in _PRODUCTS and len(operands) > 1)):
        return _by_hand([*path, node.name])
    return None


def _is_unknown_activation(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node calls a module of torch.nn.modules.activation that is neither in ACTIVATIONS nor a gate."""
    module = _called_module(node, root)
    known = module is None or is_gate_call(node, root) or isinstance(module, nn.MultiheadAttention)
    return not known and type(module).__module__ == "torch.nn.modules.activation"


def _ends_search(node: fx.Node, root: nn.Module, pure: bool) -> bool:
    """Whether a node computes a new value (or only asks a shape) rather than handing on, reshaped, pooled or joined,
    the one it got. Sums and products with constants hand on."""
    module = _called_module(node, root)
    if module is not None:
        return any(True for _ in module.parameters()) or is_norm(module)
    name = called_function(node)
    if name in _SUMS | _PRODUCTS:
        return not pure
    return node.op in ("output", "get_attr") or node.target in (getattr, "size") or name in _MIXING


def _applies_gate(node: fx.Node) -> bool:
    """Whether a node multiplies, mixes or only asks the shape of what it got."""
    return called_function(node) in _PRODUCTS | _MIXING or node.target in (getattr, "size")


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
            not type(module).__module__.startswith("torch.nn.") and not is_norm(module) and not is_activation(module)
        )
        return isinstance(module, passing) or (opaque and next(module.parameters(), None) is None)
    name = called_function(node)
    return node.op in ("call_function", "call_method") and (name is None or name in _VIEWS)
