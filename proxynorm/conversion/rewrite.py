"""Take single activation calls out of a method, leaving the rest of it as written.

F.relu(self.bn(x)) and one self.relu behind norms and sums cannot be replaced as modules. Of the
ways to keep such a forward, a mark on tensors that already passed an activation does not survive
export and scripting, and a line per known class helps no user. So the call's source is replaced by
its argument, at the position where it was seen running, in a generated subclass of the module's
class. Everything else stays Python that runs: control flow, draws, attributes, caches.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import os
import sys
import types
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from torch import nn

_MODULE = nn.modules.module.__file__
# files whose functions are no helpers of a network: torch's that call ours, and our own
_TORCH = (_MODULE, nn.functional.__file__, torch.overrides.__file__, torch._tensor.__file__)
_PLUMBING = (*_TORCH, os.path.dirname(__file__))

Edits = tuple[tuple[str, str], ...]  # methods' names, and their new source


class CannotRewriteError(ValueError):
    """A call that cannot be taken out of its method; the message says why."""


@dataclass(frozen=True)
class Site:
    """One call in a source file, made by a module's method."""

    owner: str | None  # name of the module whose method makes the call; None if none does
    method: str
    file: str
    line: int  # where the call's text ends, as Python's syntax tree counts
    column: int | None  # None before Python 3.11
    callee: str  # such as "relu", by which the call is found where column is None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def running_site(names: Mapping[nn.Module, str], callee: str) -> Site:
    """The innermost call in a method of one of the modules that is running now.

    Helper functions are looked through: the call of the helper stands for what it does. callee is
    what is called.
    """
    frame: types.FrameType | None = sys._getframe(1)
    innermost = None
    while frame is not None and not (innermost and frame.f_code.co_filename == _MODULE):
        line, column = _call_end(frame)
        # before Python 3.12 a comprehension has a frame of its own
        while frame.f_code.co_name in ("<listcomp>", "<genexpr>") and frame.f_back is not None:
            frame = frame.f_back
        code = frame.f_code
        if not code.co_filename.startswith(_PLUMBING):
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            site = Site(None, code.co_name, code.co_filename, line, column, callee)
            # a decorated method has other code than the one that runs
            method = getattr(type(first), code.co_name, None)
            if isinstance(first, nn.Module) and getattr(method, "__code__", None) is code:
                return replace(site, owner=names.get(first))
            innermost = innermost or site
            callee = code.co_name
        frame = frame.f_back
    assert innermost is not None, "no call is running"
    return innermost


def _call_end(frame: types.FrameType) -> tuple[int, int | None]:
    """Line and column where the text of the running call ends; no column before Python 3.11."""
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return frame.f_lineno, None
    _, line, _, column = next(itertools.islice(positions(), frame.f_lasti // 2, None))
    return line or frame.f_lineno, column


class RewrittenModule:
    """Mixin of generated classes; their objects copy and pickle by the original class and edits."""

    _original: type[nn.Module]
    _edits: Edits

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _blank, (self._original, self._edits), self.__dict__


def plan_edits(module: nn.Module, sites: Collection[Site]) -> Edits:
    """The source of one module's methods without the calls at the given sites.

    Raises:
        CannotRewriteError: a call's source cannot be found, or not its input.
    """
    if isinstance(module, RewrittenModule):
        raise CannotRewriteError("an earlier conversion rewrote it: convert the original model")
    edits = []
    for method in dict.fromkeys(site.method for site in sites):
        taking_out = _TakeOut([site for site in sites if site.method == method])
        node = taking_out.visit(_source_node(getattr(type(module), method)))
        if len(taking_out.found) != len(taking_out.sites):
            raise CannotRewriteError(
                "the call is not told from others on its line, or not found in the source"
            )
        node.decorator_list = []
        edits.append((method, ast.unparse(node)))
    return tuple(edits)


@functools.cache
def rewritten_class(original: Any, edits: Edits) -> Any:
    """A subclass of a module's class with the edited methods."""
    same = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = {name: _compiled(getattr(original, name), text) for name, text in edits}
    namespace = {**same, **methods, "_original": original, "_edits": edits}
    return type(original.__name__, (RewrittenModule, original), namespace)


def _blank(original: Any, edits: Edits) -> nn.Module:
    """An object of the rewritten class without state, for copying and unpickling."""
    rewritten = rewritten_class(original, edits)
    return rewritten.__new__(rewritten)


def _source_node(function: types.FunctionType) -> Any:
    """The syntax tree of a method, with the positions that it has in its file."""
    try:
        lines, first = inspect.getsourcelines(function.__code__)
        # under an `if`, a method may stay indented, so that columns are those of the file
        tree = ast.parse("if True:\n" + "".join(lines))
    except (OSError, SyntaxError) as error:
        raise CannotRewriteError("its source is not at hand") from error
    return ast.increment_lineno(tree, first - 2).body[0].body[0]  # type: ignore[attr-defined]


class _TakeOut(ast.NodeTransformer):
    """Replaces the calls at some sites by their input, and notes the sites that it found."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites, self.found = sites, list[Site]()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        here = [site for site in self.sites if _is_at(node, site)]
        self.found += here
        self.generic_visit(node)
        if not here:
            return node
        given = [*node.args, *(k.value for k in node.keywords if k.arg in ("input", "x"))]
        # y.relu() has its input before the dot; y.hardshrink(0.5) is verified against the original,
        # and refused
        value = given[0] if given else getattr(node.func, "value", None)
        if value is None or isinstance(value, ast.Starred):
            raise CannotRewriteError("its input is not told from its other arguments")
        return value


def _is_at(call: ast.Call, site: Site) -> bool:
    if site.column is not None:
        return (call.end_lineno, call.end_col_offset) == (site.line, site.column)
    # the line alone does not tell calls apart, their names may: F.leaky_relu(x), y.relu_()
    names = [ast.unparse(call.func).rpartition(".")[2], site.callee]
    first, second = (name.replace("_", "").lower() for name in names)
    return call.lineno <= site.line <= (call.end_lineno or call.lineno) and first == second


def _compiled(function: types.FunctionType, text: str) -> types.FunctionType:
    """A method with new source, and the globals, free variables and defaults of the original."""
    names = function.__qualname__.split(".")
    owner = names[-2] if len(names) > 1 and names[-2].isidentifier() else "_"
    free = ", ".join(name for name in function.__code__.co_freevars if name != "__class__")
    body = "\n".join("        " + line for line in text.splitlines())
    source = f"def _outer({free}):\n    class {owner}:\n{body}\n"
    sum_of_text = zlib.crc32(text.encode())
    filename = f"<proxynorm {function.__module__}.{function.__qualname__} {sum_of_text:08x}>"
    # inspect and torch.jit.script read the source from here
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    code = compile(source, filename, "exec", dont_inherit=True)
    for name in ("_outer", owner, function.__name__):
        code = next(
            c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name
        )
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    closure = tuple(cells[name] for name in code.co_freevars)
    defaults = function.__defaults__
    result = types.FunctionType(code, function.__globals__, function.__name__, defaults, closure)
    functools.update_wrapper(result, function)
    del result.__wrapped__  # type: ignore[attr-defined]  # inspect would find the original's source
    result.__kwdefaults__ = function.__kwdefaults__
    return result
