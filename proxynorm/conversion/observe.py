"""Watch a network run, and note what each norm's value meets first.

Tracing is not execution: a traced value takes other branches, freezes draws and attributes, and
stays behind in caches. So the
network itself runs, in training and in evaluation mode, on a copy, and two things look on: forward
hooks, which see the norms and the activations that are modules, and a TorchFunctionMode, which sees
every other call on a tensor.

The value of a norm is followed through all calls that are linear in it (tried out: f(−y) and
f(100y) tell) until the next layer, or the sum or product with another value. An activation found
there that is not right behind the norm, or a call that
is not linear, cannot be joined with the norm: it is the norm's problem.
"""

from __future__ import annotations

import itertools
import sys
import types
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from proxynorm.conversion import kinds
from proxynorm.conversion.rewrite import Site

_SUMS = {"add", "sub", "subtract", "rsub", "radd", "sum", "mean"}
_PRODUCTS = {"mul", "multiply", "rmul", "div", "divide", "true_divide", "truediv", "rdiv"}
_POWERS = {"pow", "square", "rpow"}
# Pools are taken for linear. So are means, which vanish behind some norms: there is nothing to try.
_POOLS = ("max_pool", "avg_pool", "dropout")
_EXTREMES = {"amax", "amin", "max", "min"}
_LAYERS = (
    "conv",
    "linear",
    "bilinear",
    "matmul",
    "mm",
    "bmm",
    "baddbmm",
    "addmm",
    "einsum",
    "tensordot",
)
_LAYERS += (
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "normalize",
    "lstm",
    "gru",
)
# Their results tell the shape alone, or are for checks.
_NO_VALUES = ("empty_like", "new_", "rand_like", "randn_like", "isnan", "isinf", "isfinite")
_PLUMBING = {
    __file__,
    nn.functional.__file__,
    nn.modules.module.__file__,
    torch.overrides.__file__,
    torch._tensor.__file__,
}
_COMPREHENSIONS = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"}


@dataclass(eq=False)
class NormCall:
    """One call of a norm.

    Attributes:
        activation: computes the activation right behind the norm; None if there is none.
        name: qualified name of the activation's module; None if it is a function.
        site: where the activation is called.
        between: names of the modules between norm and activation (dropout, blur) that did
            something.
        problem: why the norm cannot be joined with what follows; None if it can.
        uses: how many calls take the norm's value.
        value: the result of the activation, or of the norm where there is none.
        version: torch's count of value's in-place changes when it was computed.
    """

    activation: nn.Module | None = None
    name: str | None = None
    site: Site | None = None
    between: list[str] = field(default_factory=list)
    problem: str | None = None
    uses: int = 0
    value: Tensor | None = None
    version: int = 0

    @property
    def is_overwritten(self) -> bool:
        """True if the value was changed in place later, itself or through a view.

        Views share the count.
        """
        return self.value is not None and self.value._version != self.version


@dataclass
class _Trace:
    """Where a tensor comes from.

    sources: the norm calls whose value it holds, each with the calls that led here; direct: it is
    that call's value, unchanged;
    gated: sources seen through a sigmoid; is_mixed: it depends on other data too; activated: it is
    the result of that call's activation; convs: the convolutions whose output it holds.
    """

    sources: dict[NormCall, list[str]] = field(default_factory=dict)
    direct: NormCall | None = None
    gated: set[NormCall] = field(default_factory=set)
    is_mixed: bool = True
    activated: NormCall | None = None
    convs: frozenset[str] = frozenset()


@dataclass
class Observation:
    """What runs of a network in one mode showed.

    Attributes:
        norms: every call of each norm, by the norm's name.
        sites: at each call site, for each time it ran, the norm call whose activation it was; None
            if it was something else.
        modules: the same for each activation module.
        feeding: names of the convolutions whose output reaches a norm, alone or in a sum.
    """

    norms: dict[str, list[NormCall]] = field(default_factory=dict)
    sites: dict[Site, list[NormCall | None]] = field(default_factory=dict)
    modules: dict[str, list[NormCall | None]] = field(default_factory=dict)
    feeding: set[str] = field(default_factory=set)


class Observer(TorchFunctionMode):
    """Watches all calls while it is entered; see Observation."""

    def __init__(self, model: nn.Module, seen: Observation) -> None:
        self.model, self.seen = model, seen
        self.names = {module: name for name, module in model.named_modules()}
        self.kinds = {module: _kind(module) for module in self.names}
        # by id, beside the tensor itself, which keeps the id from being used again
        self.traces: dict[int, tuple[Tensor, _Trace]] = {}
        self.calls: list[NormCall] = []
        self.depth = (
            0  # how many norms and activations are running: what is inside of them is theirs
        )
        self.handles: list = []

    def __enter__(self) -> Observer:
        for module in self.names:
            self.handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def finish(self, output: object) -> None:
        """Settle every norm call once the network has returned its output."""
        returned = {id(t) for t in _tensors(output)}
        for call in self.calls:
            if call.activation is not None and call.uses > 1 + len(call.between):
                call.problem = "its value feeds an activation and something else as well"
            elif call.activation is None and not call.uses and id(call.value) not in returned:
                call.problem = call.problem or "no call that torch shows takes its value"

    # Modules

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module is self.model and not self.traces:
            for tensor in _tensors((args, kwargs)):
                self._set(tensor, _Trace())
        if not self.depth and self.kinds[module] != "activation":
            self.seen.sites.setdefault(self._site(type(module).__name__), []).append(None)
        self.depth += self.kinds[module] is not None

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        kind = self.kinds[module]
        self.depth -= kind is not None
        if self.depth:
            return
        if isinstance(module, nn.modules.conv._ConvNd) and isinstance(output, Tensor):
            self._set(output, _Trace(convs=frozenset({self.names[module]})))
        inputs = _tensors((args, kwargs))
        if kind is None or not inputs or not isinstance(output, Tensor):
            return
        if kind == "norm":
            self._note_norm(module, inputs[0], kwargs, output)
        elif kind == "activation":
            self._note_activation(module, inputs[0], output, self.names[module])
        else:
            self._note_other(module, kind, inputs[0], output)

    def _note_norm(self, module: nn.Module, x: Tensor, kwargs: dict, output: Tensor) -> None:
        call = NormCall(value=output, version=output._version)
        if kwargs:
            call.problem = "it is called with its input as a keyword: pass the value alone"
        elif x.ndim != 4:
            call.problem = (
                f"it normalizes no maps (N, C, H, W): its input has shape {tuple(x.shape)}"
            )
        self.calls.append(call)
        self.seen.norms.setdefault(self.names[module], []).append(call)
        self.seen.feeding |= self._trace(x).convs
        own = getattr(module, "act", None)
        if own is None or isinstance(own, nn.Identity):
            self._set(output, _Trace({call: []}, direct=call, is_mixed=False))
        else:
            call.activation, call.uses = own, 1
            self._set(output, _Trace(activated=call))

    def _note_activation(
        self, activation: nn.Module, x: Tensor, output: Tensor, name: str | None
    ) -> None:
        """Join an activation with the norm call before it, if it is right behind one."""
        trace = self._trace(x)
        call, label = trace.direct, type(activation).__name__
        site = self._site(name.rpartition(".")[2] if name else label.lower())
        if call is not None and call.activation is None:
            call.activation, call.name, call.site = activation, name, site
            call.value, call.version = output, output._version
            call.uses += 1
        else:
            call = None
            for source, path in trace.sources.items():
                through = f" behind {', '.join(path)}" if path else ""
                self._blame(source, f"the activation {label}{through} cannot be joined with it")
        self.seen.sites.setdefault(site, []).append(call)
        if name is not None:
            self.seen.modules.setdefault(name, []).append(call)
        self._set(output, _Trace(activated=call))

    def _note_other(self, module: nn.Module, kind: str, x: Tensor, output: Tensor) -> None:
        """Follow a value through a gate, or through what may stand between a norm and its
        activation.
        """
        trace, label = self._trace(x), type(module).__name__
        call = trace.direct
        if output is x:
            return
        if call is not None:
            call.uses += 1
        if kind == "between" and call is not None:
            call.between.append(self.names[module])
            self._set(output, _Trace({call: [label]}, direct=call, is_mixed=False))
            return
        for source in trace.sources if kind == "unknown" else ():
            self._blame(source, f"the activation {label} cannot be joined with it")
        sources = {source: [*path, label] for source, path in trace.sources.items()}
        gated = set(sources) if kind == "gate" else trace.gated
        self._set(output, _Trace(sources, None, gated, trace.is_mixed, None, trace.convs))

    # Functions

    def __torch_function__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        known = [t for t in inputs if id(t) in self.traces]
        if self.depth or not known:
            return func(*args, **kwargs)
        name = _plain_name(func)
        activation = kinds.activation_of_call(name, args, kwargs)
        if activation is not None:
            output = func(*args, **kwargs)
            self._note_activation(activation, inputs[0], output, None)
            return output
        versions = [t._version for t in known]
        trace = self._follow(name, func, args, kwargs, known)
        output = func(*args, **kwargs)
        changed = [t for t, version in zip(known, versions) if t._version != version]
        results = [t for t in _tensors(output) if not any(t is k for k in known)]
        if trace is not None and (results or changed):
            for source in {self._trace(t).direct for t in known} - {None}:
                source.uses += 1
            for tensor in (*results, *changed):
                self._set(tensor, trace)
        return output

    def _follow(
        self, name: str, func: object, args: tuple, kwargs: dict, known: list[Tensor]
    ) -> _Trace | None:
        """The trace of a call's result.

        Blames the norms whose value it changes in other ways than a layer does.
        """
        if name.startswith(_NO_VALUES):
            return None
        traces = [self._trace(t) for t in known]
        result = _Trace(convs=frozenset().union(*(t.convs for t in traces)), is_mixed=False)
        if name in _POWERS or (name in _PRODUCTS and len(known) > 1):
            for call in {t.activated for t in traces} - {None}:
                if name in _POWERS or all(t.activated is call for t in traces):
                    label = type(call.activation).__name__
                    call.problem = self._by_hand([label, name])
        for source in dict.fromkeys(itertools.chain(*(t.sources for t in traces))):
            holders = [t for t in known if source in self._trace(t).sources]
            path = [*self._trace(holders[0]).sources[source], name]
            has_others = len(holders) < len(known)
            is_gated = any(source in t.gated for t in traces)
            is_layer = name in _LAYERS or name.startswith("conv") or name.endswith("_norm")
            is_pure = not any(t.is_mixed or set(t.sources) != {source} for t in traces)
            if is_layer or (name in _SUMS | _PRODUCTS and not is_pure):
                if is_gated and (name in _SUMS or not has_others):
                    told = ", ".join(path[:-1])
                    self._blame(source, f"the sigmoid behind it ({told}) gates no other value")
                if not is_layer and _dependence(func, args, kwargs, holders) == "other":
                    self._blame(source, self._by_hand(path))
                result.is_mixed = True
                continue
            if kinds.is_gate_function(name):
                result.gated.add(source)
            elif not _is_pool(name, args):
                depends = _dependence(func, args, kwargs, holders)
                if depends == "none":
                    continue
                if depends == "other":
                    self._blame(source, self._by_hand(path))
            result.sources[source] = path
            result.gated |= {source} if is_gated else set()
        result.is_mixed |= any(t.is_mixed for t in traces)
        return result

    # Helpers

    def _trace(self, tensor: Tensor) -> _Trace:
        return self.traces[id(tensor)][1] if id(tensor) in self.traces else _Trace(is_mixed=False)

    def _set(self, tensor: Tensor, trace: _Trace) -> None:
        self.traces[id(tensor)] = tensor, trace

    def _blame(self, call: NormCall, problem: str) -> None:
        call.problem = call.problem or problem

    def _by_hand(self, path: list[str]) -> str:
        return (
            f"an activation written by hand may stand behind it ({', '.join(path)} at "
            f"{self._site('')}), since {path[-1]} is not linear: make the activation a module of "
            "its own, like nn.SiLU"
        )

    def _site(self, callee: str) -> Site:
        """The innermost call in the user's code that is running now."""
        frame = sys._getframe(1)
        while frame.f_code.co_filename in _PLUMBING:
            frame = frame.f_back
        line, column = _call_end(frame)
        while frame.f_code.co_name in _COMPREHENSIONS:
            frame = frame.f_back
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        name = self.names.get(owner) if isinstance(owner, nn.Module) else None
        return Site(name, code, line, column, callee)


def _kind(module: nn.Module) -> str | None:
    """The part that a module plays; None for one whose own calls are watched."""
    tests = {
        "norm": kinds.is_norm,
        "activation": kinds.is_activation,
        "gate": kinds.is_gate,
        "between": kinds.may_stand_between,
        "unknown": kinds.is_unknown_activation,
    }
    return next((kind for kind, test in tests.items() if test(module)), None)


def _call_end(frame: types.FrameType) -> tuple[int, int | None]:
    """Line and column where the text of the running call ends.

    The column is None before Python 3.11.
    """
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return frame.f_lineno, None
    _, line, _, column = next(itertools.islice(positions(), frame.f_lasti // 2, None))
    return line or frame.f_lineno, column


def _plain_name(func: object) -> str:
    """A torch function's name, without the marks of operators and of in-place variants."""
    name = getattr(func, "__name__", "").strip("_")
    return name[1:] if name[1:] in _SUMS | _PRODUCTS | _POWERS else name


def _is_pool(name: str, args: tuple) -> bool:
    is_extreme = name in _EXTREMES and len(_tensors(args)) == 1  # torch.max(y, other) is a curve
    return is_extreme or name in ("sum", "mean") or any(pool in name for pool in _POOLS)


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _dependence(func: object, args: tuple, kwargs: dict, holders: list[Tensor]) -> str:
    """How a call depends on some of its arguments: "linear" (or affine), "none", or "other"."""
    ids = {id(t) for t in holders}
    if not all(t.is_floating_point() for t in holders):
        return "other"

    def scaled(factor: float) -> list[Tensor]:
        def scale(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return value.detach() * factor if id(value) in ids else value.detach().clone()

        new_args, new_kwargs = tree_map(scale, (args, kwargs))
        output = func(*new_args, **new_kwargs)
        return _tensors(output if output is not None else new_args)

    try:
        zero, one, minus, large = (scaled(factor) for factor in (0.0, 1.0, -1.0, 100.0))
    except (RuntimeError, TypeError):
        return "other"
    if all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(zero, one, minus)):
        return "none"
    if not all(t.is_floating_point() or t.is_complex() for t in one):
        return "other"
    for base, up, down, far in zip(zero, one, minus, large):
        step, tolerance = up - base, torch.finfo(up.dtype).eps ** 0.5
        bound = tolerance * step.abs().max().clamp_min(1e-30)
        if not ((down - base + step).abs() <= bound).all():
            return "other"
        if not ((far - base - 100 * step).abs() <= 100 * bound).all():
            return "other"
    return "linear"
