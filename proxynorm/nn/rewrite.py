"""Takes single activation calls out of a module's forward, where the activation cannot be replaced as a module:
functional calls, and one activation module called at several places (torchvision's Bottleneck)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx, nn

from proxynorm.nn.dataflow import FlowTracer, optional_arguments


class RewrittenForward:
    """Mixin: runs a forward of which some activation calls were taken out.

    The object stays what it was (class, attributes, children, state-dict keys); it copies and pickles, since what is
    kept is the list of calls, and the new forward is made from the original one by symbolic tracing when needed.
    Control flow that depends on anything but `training` is fixed as it was when the forward was made.
    """

    absorbed_calls: frozenset[int]

    def forward(self, *args: object, **kwargs: object) -> object:
        """The original forward without the absorbed activation calls."""
        return self._forwards[self.training](self, *args, **kwargs)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_forwards"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        _make_forwards(self)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _blank, (type(self).__mro__[2],), self.__getstate__()


def absorb_calls(module: nn.Module, ordinals: Iterable[int]) -> None:
    """Takes the activation calls with these ordinals (in the order of execution) out of a module's forward, in place.

    Args:
        module: the module whose forward makes the calls.
        ordinals: which of its activation calls; each becomes the identity at that place alone.

    Raises:
        ValueError: the forward cannot be traced by itself.
    """
    already = getattr(module, "absorbed_calls", None)
    if already is not None:
        raise ValueError(f"the forward of this {type(module).__name__} was rewritten before: convert the original model")
    module.absorbed_calls = frozenset(ordinals)
    module.__class__ = _rewritten_class(type(module))
    _make_forwards(module)


def _rewritten_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class that runs the rewritten forward of `original`, under the same name."""
    return type(original.__name__, (RewrittenForward, original), {"__module__": original.__module__})


def _blank(original: type[nn.Module]) -> nn.Module:
    """An object of the rewritten class without state; for copying and unpickling."""
    rewritten = _rewritten_class(original)
    return rewritten.__new__(rewritten)


def _make_forwards(module: nn.Module) -> None:
    """Sets module._forwards: the rewritten forward for evaluation (False) and for training (True)."""
    mode = module.training
    try:
        forwards = {}
        for training in (False, True):
            module.training = training
            forwards[training] = _make_forward(module)
        module.__dict__["_forwards"] = forwards
    finally:
        module.training = mode


def _make_forward(module: nn.Module) -> Callable:
    """The rewritten forward in the present mode, as a function of the module and its inputs."""
    rewritten, original = type(module), type(module).__mro__[2]
    module.__class__ = original
    try:
        graph = FlowTracer(shallow=True).trace(module, optional_arguments(original.forward))
    except Exception as error:
        raise ValueError(f"the forward of {original.__name__} cannot be rewritten: {error}") from error
    finally:
        module.__class__ = rewritten
    for node in list(graph.nodes):
        if "site" in node.meta and node.meta["site"].ordinal in module.absorbed_calls:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return type(fx.GraphModule(module, graph)).forward
