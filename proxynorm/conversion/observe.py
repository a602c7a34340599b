"""Watch a network run, and note what each norm's value meets first.

Tracing is not execution: a traced value takes other branches, freezes draws and attributes, and
stays behind in caches. So the network itself runs, in training and in evaluation mode, on a copy,
and two things look on: forward hooks, which see the norms and the activations that are modules, and
a TorchFunctionMode, which sees every other call on a tensor.

The value of a norm is followed through all calls that are linear in it until the next layer, or the
sum or product with another value. An activation found there that is not right behind the norm, or a
call that is not linear, cannot be joined with the norm: it is the norm's problem.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from proxynorm.conversion import kinds
from proxynorm.conversion.dependence import (
    POWERS,
    PRODUCTS,
    SUMS,
    dependence,
    holds_no_value,
    is_layer,
    is_pool,
    plain_name,
    tensors_in,
)
from proxynorm.conversion.rewrite import Site, running_site


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
        """True if the value was changed in place later, itself or through a view."""
        return self.value is not None and self.value._version != self.version


@dataclass
class Observation:
    """The observations of a network in one mode.

    Attributes:
        norms: every call of each norm, by the norm's name.
        sites: at each call site, for each time it ran, the norm call whose activation it was; None
            if it was something else.
        modules: the same for each activation module.
        feeding: names of the convolutions whose output reaches a norm, alone or in a sum.
        error: why the network did not run in this mode; None if it did.
    """

    norms: dict[str, list[NormCall]] = field(default_factory=dict)
    sites: dict[Site, list[NormCall | None]] = field(default_factory=dict)
    modules: dict[str, list[NormCall | None]] = field(default_factory=dict)
    feeding: set[str] = field(default_factory=set)
    error: str | None = None


@dataclass
class _Trace:
    """Where a tensor comes from.

    Attributes:
        sources: the norm calls whose value it holds, each with the calls that led here.
        direct: it is that call's value, unchanged.
        gated: sources seen through a sigmoid.
        is_mixed: it depends on other data too.
        activated: it is the result of that call's activation.
        convs: the convolutions whose output it holds.
    """

    sources: dict[NormCall, list[str]] = field(default_factory=dict)
    direct: NormCall | None = None
    gated: set[NormCall] = field(default_factory=set)
    is_mixed: bool = True
    activated: NormCall | None = None
    convs: frozenset[str] = frozenset()


class Observer(TorchFunctionMode):
    """Watches all calls while it is entered; see Observation."""

    def __init__(self, model: nn.Module, seen: Observation) -> None:
        self.model, self.seen = model, seen
        self.names = {module: name for name, module in model.named_modules()}
        self.kinds = {module: _kind(module) for module in self.names}
        # by id, beside the tensor itself, which keeps the id from being used again
        self.traces: dict[int, tuple[Tensor, _Trace]] = {}
        self.calls: list[NormCall] = []
        # how many norms and activations are running: what is inside of them is theirs
        self.depth = 0
        self.handles: list[Any] = []

    def __enter__(self) -> Observer:
        for module in self.names:
            self.handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def finish(self, output: object) -> None:
        """Settle every norm call once the network has returned its output."""
        returned = {id(t) for t in tensors_in(output)}
        for call in self.calls:
            if call.activation is not None and call.uses > 1 + len(call.between):
                call.problem = "its value feeds an activation and something else as well"
            if call.activation is None:
                call.between.clear()  # nothing to stand between
            if call.activation is None and not call.uses and id(call.value) not in returned:
                call.problem = call.problem or "no call that torch shows takes its value"

    # Modules

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.model and not self.traces:
            for tensor in tensors_in((args, kwargs)):
                self._set(tensor, _Trace())
        if not self.depth and self.kinds[module] != "activation":
            self.seen.sites.setdefault(self._site(type(module).__name__), []).append(None)
        self.depth += self.kinds[module] is not None

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        kind = self.kinds[module]
        self.depth -= kind is not None
        inputs = tensors_in((args, kwargs))
        if self.depth or not inputs or not isinstance(output, Tensor):
            return
        if kind == "norm":
            self._note_norm(module, inputs[0], kwargs, output)
        elif kind == "activation":
            self._note_activation(module, inputs[0], output, self.names[module])
        elif kind is not None:
            self._note_other(module, kind, inputs[0], output)
        elif isinstance(module, nn.modules.conv._ConvNd):
            self._set(output, _Trace(convs=frozenset({self.names[module]})))

    def _note_norm(
        self, module: nn.Module, x: Tensor, kwargs: dict[str, Any], output: Tensor
    ) -> None:
        call = NormCall(value=output, version=output._version)
        if kwargs:
            call.problem = "it is called with its input as a keyword: pass the value alone"
        elif x.ndim != 4:
            shape = tuple(x.shape)
            call.problem = f"it normalizes no maps (N, C, H, W): its input has shape {shape}"
        self.calls.append(call)
        self.seen.norms.setdefault(self.names[module], []).append(call)
        self.seen.feeding |= self._trace(x).convs
        call.activation = kinds.own_activation(module)
        if call.activation is None:
            self._set(output, _Trace({call: []}, direct=call, is_mixed=False))
        else:
            call.uses = 1
            self._set(output, _Trace(activated=call))

    def _note_activation(
        self, activation: nn.Module, x: Tensor, output: Tensor, name: str | None
    ) -> None:
        """Join an activation with the norm call before it, if it is right behind one."""
        trace, label = self._trace(x), type(activation).__name__
        site = self._site(name.rpartition(".")[2] if name else label)
        call = trace.direct
        if call is not None and call.activation is None:
            call.activation, call.name, call.site = activation, name, site
            call.value, call.version = output, output._version
            call.uses += 1
        else:
            call = None
            for source, path in trace.sources.items():
                through = f" behind {', '.join(path)}" if path else ""
                _blame(source, f"the activation {label}{through} cannot be joined with it")
        self.seen.sites.setdefault(site, []).append(call)
        if name is not None:
            self.seen.modules.setdefault(name, []).append(call)
        self._set(output, _Trace(activated=call))

    def _note_other(self, module: nn.Module, kind: str, x: Tensor, output: Tensor) -> None:
        """Follow a value through a gate, or what may stand between a norm and its activation."""
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
        sources = {source: [*path, label] for source, path in trace.sources.items()}
        gated = set(sources) if kind == "gate" else trace.gated
        self._set(output, _Trace(sources, None, gated, trace.is_mixed, None, trace.convs))

    # Functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        known = [t for t in inputs if id(t) in self.traces]
        if self.depth or not known:
            return func(*args, **kwargs)
        name = plain_name(func)
        activation = kinds.activation_of_call(name, args, kwargs)
        if activation is not None:
            output = func(*args, **kwargs)
            self._note_activation(activation, inputs[0], output, None)
            return output
        versions = [t._version for t in known]
        trace = None if holds_no_value(name) else self._follow(name, func, args, kwargs, known)
        output = func(*args, **kwargs)
        changed = [t for t, version in zip(known, versions) if t._version != version]
        results = [t for t in tensors_in(output) if not any(t is k for k in known)]
        if trace is not None and (results or changed):
            for call in {d for t in known if (d := self._trace(t).direct) is not None}:
                call.uses += 1
            for tensor in (*results, *changed):
                self._set(tensor, trace)
        return output

    def _follow(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: list[Tensor],
    ) -> _Trace:
        """The trace of a call's result.

        Blames the norms whose value the call changes in other ways than a layer does.
        """
        traces = [self._trace(t) for t in known]
        self._blame_curves_of_activations(name, traces)
        result = _Trace(convs=frozenset().union(*(t.convs for t in traces)), is_mixed=False)
        for source in {source: None for t in traces for source in t.sources}:
            holders = [t for t in known if source in self._trace(t).sources]
            path = [*self._trace(holders[0]).sources[source], name]
            is_gated = any(source in t.gated for t in traces)
            is_pure = not any(t.is_mixed or set(t.sources) != {source} for t in traces)
            if is_layer(name) or (name in SUMS | PRODUCTS and not is_pure):
                if is_gated and (name in SUMS or len(holders) == len(known)):
                    told = ", ".join(path[:-1])
                    _blame(source, f"the sigmoid behind it ({told}) gates no other value")
                if not is_layer(name) and dependence(func, args, kwargs, holders) == "other":
                    _blame(source, self._by_hand(path))
                result.is_mixed = True
                continue
            is_gate = kinds.is_gate_function(name)
            if not is_gate and not is_pool(name, args):
                depends = dependence(func, args, kwargs, holders)
                if depends == "none":
                    continue
                if depends == "other":
                    _blame(source, self._by_hand(path))
            result.sources[source] = path
            result.gated |= {source} if is_gated or is_gate else set()
        result.is_mixed |= any(t.is_mixed for t in traces)
        return result

    def _blame_curves_of_activations(self, name: str, traces: list[_Trace]) -> None:
        """relu(y)² and relu(y)·relu(y) are activations of their own."""
        for call in {t.activated for t in traces if t.activated is not None}:
            is_product = name in PRODUCTS and len(traces) > 1
            if name in POWERS or (is_product and all(t.activated is call for t in traces)):
                call.problem = self._by_hand([type(call.activation).__name__, name])

    # Helpers

    def _trace(self, tensor: Tensor) -> _Trace:
        return self.traces[id(tensor)][1] if id(tensor) in self.traces else _Trace(is_mixed=False)

    def _set(self, tensor: Tensor, trace: _Trace) -> None:
        self.traces[id(tensor)] = tensor, trace

    def _site(self, callee: str) -> Site:
        return running_site(sys._getframe(1), self.names, callee, plumbing=__file__)

    def _by_hand(self, path: list[str]) -> str:
        return (
            f"an activation written by hand may stand behind it ({', '.join(path)} at "
            f"{self._site('')}), since {path[-1]} is not linear: make the activation a module of "
            "its own, like nn.SiLU"
        )


def _blame(call: NormCall, problem: str) -> None:
    call.problem = call.problem or problem


def _kind(module: nn.Module) -> str | None:
    """The part that a module plays; None for one whose own calls are watched."""
    tests = {
        "norm": kinds.is_norm,
        "activation": kinds.is_activation,
        "gate": kinds.is_gate,
        "between": kinds.may_stand_between,
    }
    return next((kind for kind, test in tests.items() if test(module)), None)
