"""Run a network and observe what follows each norm.

Symbolic tracing differs from execution: it takes other branches, turns random draws and attributes
into constants, and leaves traced values behind in caches. So a copy of the network is run, in
training and in evaluation mode. Forward hooks observe the norms and activations that are modules,
and a TorchFunctionMode observes all other calls on tensors.

The value of a norm is followed through calls that are linear in it, until it feeds a layer or is
combined with another value by a sum or product. If it meets a nonlinear call before that, or an
activation that is not right behind the norm, nothing can be joined with the norm. This is noted as
the norm's problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from proxynorm.conversion import kinds
from proxynorm.conversion.kinds import tensors_in
from proxynorm.conversion.rewrite import Site, running_site
from proxynorm.conversion.run import Forward, copy_to_run, forwards_of, run


@dataclass(eq=False)
class NormCall:
    """One call of a norm, and what followed it."""

    norm: str  # the norm's name
    value: Tensor  # the output of the activation, or of the norm if there is none
    activation: nn.Module | None = None  # the activation right behind the norm
    name: str | None = None  # the activation's; None: it is a function, or part of the norm
    site: Site | None = None  # where the activation is called
    # names of the modules between norm and activation that changed the value (dropout, blur)
    between: list[str] = field(default_factory=list)
    problem: str | None = None  # why the norm cannot be joined with what follows
    uses: int = 0  # number of calls that take the norm's value
    is_taken: bool = False  # a layer, sum, product or dropped branch takes it, scaled or not
    version: int = 0  # torch's counter of in-place changes of value, when it was computed

    @property
    def is_overwritten(self) -> bool:
        """True if the value was changed in place later, directly or through a view."""
        return self.value._version != self.version

    def blame(self, problem: str) -> None:
        """Note why the norm cannot be joined with what follows. The first reason is kept."""
        self.problem = self.problem or problem


@dataclass
class Observation:
    """The findings of a network's runs."""

    calls: list[NormCall] = field(default_factory=list)
    # for every call of an activation module: its name, and the norm call right before it
    activations: list[tuple[str, NormCall | None]] = field(default_factory=list)
    # names of the convolutions whose output reaches a norm, alone or in a sum
    feeding: set[str] = field(default_factory=set)
    errors: dict[str, str] = field(default_factory=dict)  # by mode, the error of the network


def observe(model: nn.Module, example_inputs: object) -> tuple[Forward, Observation]:
    """Run copies of the model in both modes; return the forward pass that worked, and the findings.

    If the network fails in one mode (such as a detector in training, without targets), the findings
    are those of the other.

    Raises:
        ValueError: the network fails in both modes, with all inputs that were tried.
    """
    best, last_error = None, ""
    for forward in forwards_of(model, example_inputs):
        seen, copied = Observation(), copy_to_run(model)
        for mode in ("training", "evaluation"):
            observer = Observer(copied, mode, seen)
            try:
                with observer:
                    output = run(copied, forward, mode == "training")
                observer.finish(output)
            except Exception as error:
                first_line = str(error).strip().partition("\n")[0]
                last_error = seen.errors[mode] = f"{type(error).__name__}: {first_line}"
        if not seen.errors:
            return forward, seen
        if len(seen.errors) == 1:
            best = best or (forward, seen)
    if best is None:
        tried = "random images" if example_inputs is None else "the example inputs"
        advice = "pass example_inputs=" if example_inputs is None else "check example_inputs"
        raise ValueError(
            f"cannot run this {type(model).__name__} on {tried}: {advice}. The last error: "
            f"{last_error}"
        )
    return best


@dataclass
class _Trace:
    """Where a tensor comes from."""

    # the norm calls whose value the tensor holds, each with the names of the functions on the way;
    # none if the tensor is the value itself
    sources: dict[NormCall, list[str]] = field(default_factory=dict)
    is_gated: bool = False  # a source passed a sigmoid on the way
    is_mixed: bool = True  # the tensor depends on other data too
    activated: NormCall | None = None  # the norm call whose activation computed the tensor
    convs: frozenset[str] = frozenset()  # the convolutions whose output it holds

    @property
    def direct(self) -> NormCall | None:
        """The norm call whose value this is."""
        return next((call for call, path in self.sources.items() if not path), None)


_CONSTANT = _Trace(is_mixed=False)


class Observer(TorchFunctionMode):
    """A context that observes all calls and adds them to an Observation."""

    def __init__(self, model: nn.Module, mode: str, seen: Observation) -> None:
        self.model, self.seen = model, seen
        self.problem_prefix = "in evaluation mode, " if mode == "evaluation" else ""
        self.names = {module: name for name, module in model.named_modules()}
        self.kinds = {module: kinds.kind_of(module) for module in self.names}
        # by id; the tensor is stored as well, so that its id is not reused
        self.traces: dict[int, tuple[Tensor, _Trace]] = {}
        self.calls: list[NormCall] = []
        self.activations: list[tuple[str, NormCall | None]] = []
        # number of norms, activations and gates that are running; calls inside them are ignored
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
        """Complete every norm call once the network has returned its output."""
        returned = {call for t in tensors_in(output) for call in self._trace(t).sources}
        for call in self.calls:
            if call.activation is None:
                call.between.clear()  # without an activation, nothing is between
                if not call.is_taken and call not in returned:
                    call.blame("no torch function was seen to take its value")
            elif call.uses > 1 + len(call.between):
                call.problem = "its value feeds an activation and something else as well"
            if call.problem:
                call.problem = self.problem_prefix + call.problem
        self.seen.calls += self.calls
        self.seen.activations += self.activations

    # Modules

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-forward hook of every module."""
        if module is self.model:  # may be called several times
            inputs = tensors_in((args, kwargs))
            self._set(_Trace(), *(t for t in inputs if id(t) not in self.traces))
        self.depth += self.kinds[module] is not None

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        """Forward hook of every module: follow what norms, activations and the like return."""
        kind, name = self.kinds[module], self.names[module]
        self.depth -= kind is not None
        inputs = tensors_in((args, kwargs))
        if self.depth or not inputs or not isinstance(output, Tensor):
            return
        if kind == "norm":
            activation = kinds.own_activation(module)
            call = NormCall(name, output, activation, version=output._version)
            self.calls.append(call)
            before = self._trace(inputs[0])
            self.seen.feeding |= before.convs
            for source in before.sources:
                source.is_taken = True
            followed = _Trace({call: []}, is_mixed=False)
            self._set(followed if activation is None else _Trace(activated=call), output)
        elif kind == "activation":
            self._note_activation(module, inputs[0], output, name)
        elif kind is not None and output is not inputs[0]:
            self._note_gate_or_between(module, inputs[0], output)
        elif isinstance(module, nn.modules.conv._ConvNd):
            self._set(_Trace(convs=frozenset({name})), output)

    def _note_activation(
        self, activation: nn.Module, x: Tensor, output: Tensor, name: str | None
    ) -> None:
        """Join an activation with the norm call right before it, if there is one."""
        trace, label = self._trace(x), type(activation).__name__
        call = trace.direct
        if call is not None and call.activation is None:
            call.activation, call.name = activation, name
            call.site = running_site(self.names, name.rpartition(".")[2] if name else label)
            call.value, call.version = output, output._version
            call.uses += 1
        else:
            call = None
            for source, path in trace.sources.items():
                through = f" behind {', '.join(path)}" if path else ""
                source.blame(f"the activation {label}{through} cannot be joined with it")
        if name is not None:
            self.activations.append((name, call))
        self._set(_Trace(activated=call), output)

    def _note_gate_or_between(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Follow a value through a gate, or through a module such as dropout."""
        trace, is_gate = self._trace(x), self.kinds[module] == "gate"
        call = trace.direct
        if call is not None:
            call.uses += 1
            if not is_gate:
                call.between.append(self.names[module])
                self._set(trace, output)
                return
        sources = {s: [*path, type(module).__name__] for s, path in trace.sources.items()}
        is_gated = is_gate or trace.is_gated
        self._set(replace(trace, sources=sources, is_gated=is_gated, activated=None), output)

    # Functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Make a call of a torch function, and follow the values through it.

        Calls inside a norm, an activation or a gate are only made: the hooks observe those.
        """
        called = kinds.Call(func, args, kwargs or {})
        inputs = tensors_in((args, kwargs))
        known = [t for t in inputs if id(t) in self.traces]
        if self.depth or not known or called.name.startswith(kinds.NO_VALUES):
            return func(*args, **called.kwargs)
        activation = kinds.activation_of_call(called)
        if activation is not None:
            output = func(*args, **called.kwargs)
            self._note_activation(activation, inputs[0], output, None)
            return output
        versions = [t._version for t in known]
        trace = self._follow(called, known)
        output = func(*args, **called.kwargs)
        changed = [t for t, version in zip(known, versions) if t._version != version]
        results = [t for t in tensors_in(output) if not any(t is k for k in known)]
        if results or changed:
            for call in {d for t in known if (d := self._trace(t).direct) is not None}:
                call.uses += 1
            self._set(trace, *results, *changed)
        return output

    def _follow(self, called: kinds.Call, known: list[Tensor]) -> _Trace:
        """The trace of a call's result.

        If the call may be an activation written by hand, that is noted as the norm's problem.
        """
        name, traces = called.name, [self._trace(t) for t in known]
        for call in {t.activated for t in traces if t.activated is not None}:
            # relu(y)² and relu(y)·relu(y) are other activations than relu(y)
            is_power = name in kinds.POWERS or (name in kinds.PRODUCTS and len(traces) > 1)
            if is_power and all(t.activated is call for t in traces):
                call.problem = self._by_hand([type(call.activation).__name__, name])
        convs = frozenset().union(*(t.convs for t in traces))
        result = _Trace(convs=convs, is_mixed=any(t.is_mixed for t in traces))
        is_gated = any(t.is_gated for t in traces)
        for source in dict.fromkeys(source for t in traces for source in t.sources):
            holders = [t for t in known if source in self._trace(t).sources]
            path = [*self._trace(holders[0]).sources[source], name]
            # a dropped branch (its result is 0) has no source, but is still another value
            is_alone = all(not t.is_mixed and set(t.sources) == {source} for t in traces)
            does = kinds.effect(called, holders, is_alone)
            if does == "other":
                source.blame(self._by_hand(path))
            elif does in ("layer", "sum", "product"):
                result.is_mixed = source.is_taken = True
                if is_gated and (does == "sum" or len(holders) == len(known)):
                    calls = ", ".join(path[:-1])
                    source.blame(f"the sigmoid behind it ({calls}) gates no other value")
            elif does == "none":
                source.is_taken = True
            elif does != "leaves":
                result.sources[source] = path
                result.is_gated |= is_gated or does == "gate"
        return result

    # Helpers

    def _trace(self, tensor: Tensor) -> _Trace:
        return self.traces[id(tensor)][1] if id(tensor) in self.traces else _CONSTANT

    def _set(self, trace: _Trace, *tensors: Tensor) -> None:
        self.traces.update({id(tensor): (tensor, trace) for tensor in tensors})

    def _by_hand(self, path: list[str]) -> str:
        """The problem of a norm behind which the last function of `path` is not linear."""
        site = running_site(self.names, "")
        return (
            f"an activation written by hand may stand behind it ({', '.join(path)} at {site}), "
            f"since {path[-1]} is not linear: make the activation a module of its own, like nn.SiLU"
        )
