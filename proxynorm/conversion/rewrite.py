"""Takes single activation calls out of a module's forward, where the activation cannot be replaced as a module:
functional calls, and one activation module called at several places (torchvision's Bottleneck)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable

from torch import fx, nn

from proxynorm.conversion.dataflow import FlowTracer


class RewrittenForward:
    """Mixin: runs a forward of which some activation calls were taken out.

    The object stays what it was (class, attributes, children, state-dict keys); it copies and pickles, since what is
    kept is the list of calls, and the new forward is made from the original one by symbolic tracing when needed.
    Control flow that depends on anything but `training` is fixed as it was when the forward was made.
    """

    absorbed_calls: frozenset[int]
    fixed_arguments: dict[str, object]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_forwards"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        original = type(self).__mro__[2]
        self.__dict__["_forwards"] = rewritten_forwards(
            self, self.absorbed_calls, self.fixed_arguments, original
        )

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _blank, (type(self).__mro__[2],), self.__getstate__()


def rewritten_forwards(
    module: nn.Module, calls: Iterable[int], fixed: dict[str, object], original: type | None = None
) -> dict[bool, Callable]:
    """The forwards of a module, for evaluation (False) and training (True), without some of its activation calls.

    Args:
        module: the module whose forward makes the calls; it is not changed.
        calls: which of its activation calls (counted from 0 as they are executed) become the identity.
        fixed: values of the forward's optional arguments that are no tensors; other values raise when it is called.
        original: the class whose forward is meant; None: the module's own.

    Raises:
        ValueError: the forward cannot be traced by itself.
    """
    mode, present = module.training, module.__class__
    try:
        module.__class__ = original or present
        forwards = {}
        for training in (False, True):
            module.training = training
            forwards[training] = _rewritten_forward(module, frozenset(calls), fixed)
        return forwards
    finally:
        module.training, module.__class__ = mode, present


def _rewritten_forward(
    module: nn.Module, calls: frozenset[int], fixed: dict[str, object]
) -> Callable:
    """The forward in the module's present mode, as a function of the module and its inputs."""
    try:
        graph = FlowTracer(shallow=True).trace(module, fixed)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the forward of {type(module).__name__} cannot be rewritten: {reason}"
        ) from error
    for node in list(graph.nodes):
        if "site" in node.meta and node.meta["site"].ordinal in calls:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return type(fx.GraphModule(module, graph)).forward


def install_forwards(
    module: nn.Module,
    calls: Iterable[int],
    fixed: dict[str, object],
    forwards: dict[bool, Callable],
) -> None:
    """Makes a module run the result of rewritten_forwards, in place; arguments as there."""
    module.absorbed_calls = frozenset(calls)
    module.fixed_arguments = fixed
    module.__dict__["_forwards"] = forwards
    module.__class__ = _rewritten_class(type(module))


def _rewritten_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that runs the rewritten forward of `original`, under the same name and with the same signature."""

    signature = inspect.signature(original.forward)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        if kwargs:  # traced forwards have other names for their arguments
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args[1:], bound.kwargs
        return self._forwards[self.training](self, *args, **kwargs)

    namespace = {"__module__": original.__module__, "forward": forward}
    return type(original.__name__, (RewrittenForward, original), namespace)


def _blank(original: type[nn.Module]) -> nn.Module:
    """An object of the rewritten class without state; for copying and unpickling."""
    rewritten = _rewritten_class(original)
    return rewritten.__new__(rewritten)
