"""Remove single activation calls from a method, and keep the rest of it as written.

The activation in F.relu(self.bn(x)), or a single self.relu that is called after norms and after
sums, cannot be replaced as a module. Instead, a subclass of the module's class is generated. In the
source of its method, the call is replaced by the call's argument, at the position where it was seen
running. The rest of the method, with its control flow, random draws, attributes and caches, still
runs as Python.

Alternatives are worse: a mark on tensors that already passed an activation does not survive export
and scripting, and a list of known classes does not help with a user's own.
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
# Files whose functions are not part of a network: torch's files that call this code, and our own.
_TORCH = (_MODULE, nn.functional.__file__, torch.overrides.__file__, torch._tensor.__file__)
_PLUMBING = (*_TORCH, os.path.dirname(__file__))

Edits = tuple[tuple[str, str], ...]  # names of methods, each with its new source


class CannotRewriteError(ValueError):
    """A call cannot be removed from its method; the message says why."""


@dataclass(frozen=True)
class Site:
    """One call in a source file, in a method of a module."""

    owner: str | None  # name of the module with the method; None if it is not a module's method
    method: str
    file: str
    line: int  # where the call's text ends, as Python's syntax tree counts
    column: int | None  # None before Python 3.11
    callee: str  # such as "relu"; identifies the call if column is None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def running_site(names: Mapping[nn.Module, str], callee: str) -> Site:
    """The innermost running call in a method of one of the modules.

    If the method calls a helper (a function, or a module that is not one of these), the site is the
    call of the helper. callee is the name of what is called.
    """
    frame: types.FrameType | None = sys._getframe(1)
    innermost = None
    while frame is not None:
        is_module_call = frame.f_code.co_filename == _MODULE
        if innermost and is_module_call and frame.f_locals.get("self") in names:
            break
        line, column = _call_end(frame)
        # before Python 3.12 a comprehension has a frame of its own
        while frame.f_code.co_name in ("<listcomp>", "<genexpr>") and frame.f_back is not None:
            frame = frame.f_back
        code = frame.f_code
        if not code.co_filename.startswith(_PLUMBING):
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            site = Site(None, code.co_name, code.co_filename, line, column, callee)
            # if the method is decorated, the class attribute has other code than the frame
            method = getattr(type(first), code.co_name, None)
            is_method = getattr(method, "__code__", None) is code
            if is_method and isinstance(first, nn.Module) and first in names:
                return replace(site, owner=names[first])
            innermost = innermost or site
            callee = code.co_name
        frame = frame.f_back
    assert innermost is not None, "no call is running"
    return innermost


def _call_end(frame: types.FrameType) -> tuple[int, int | None]:
    """The line and column where the running call's text ends; no column before Python 3.11."""
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return frame.f_lineno, None
    # f_lasti counts bytes, and co_positions code units of two bytes.
    _, line, _, column = next(itertools.islice(positions(), frame.f_lasti // 2, None))
    return line or frame.f_lineno, column


class RewrittenModule:
    """Mixin of generated classes: objects are pickled by the original class and the edits."""

    _original: type[nn.Module]
    _edits: Edits

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # with the state that the class's __getstate__ returns, if it has one
        plain: Any = super().__reduce_ex__(protocol)
        return _blank, (self._original, self._edits), *plain[2:]


def plan_edits(module: nn.Module, sites: Collection[Site]) -> Edits:
    """The source of a module's methods without the calls at the given sites.

    Raises:
        CannotRewriteError: the source of a call, or the call's input, cannot be found.
    """
    if isinstance(module, RewrittenModule):
        raise CannotRewriteError("an earlier conversion rewrote it: convert the original model")
    edits = []
    for method in dict.fromkeys(site.method for site in sites):
        remover = _CallRemover([site for site in sites if site.method == method])
        node = remover.visit(_source_node(getattr(type(module), method)))
        if len(remover.found) != len(remover.sites):
            raise CannotRewriteError(
                "the call cannot be distinguished from others on its line, or is not in the source"
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
    """An object of the rewritten class without attributes, for copying and unpickling."""
    rewritten = rewritten_class(original, edits)
    return rewritten.__new__(rewritten)


def _source_node(function: types.FunctionType) -> Any:
    """The syntax tree of a method, with the positions of its file."""
    try:
        lines, first = inspect.getsourcelines(function.__code__)
        # Under an `if`, the method can stay indented, so its columns are those of the file.
        tree = ast.parse("if True:\n" + "".join(lines))
    except (OSError, SyntaxError) as error:
        raise CannotRewriteError("its source is not available") from error
    return ast.increment_lineno(tree, first - 2).body[0].body[0]  # type: ignore[attr-defined]


class _CallRemover(ast.NodeTransformer):
    """Replaces the calls at the given sites by their input, and lists the sites found."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites, self.found = sites, list[Site]()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        here = [site for site in self.sites if _is_at(node, site)]
        self.found += here
        self.generic_visit(node)
        if not here:
            return node
        given = [*node.args, *(k.value for k in node.keywords if k.arg in ("input", "x"))]
        # The input of y.relu() stands before the dot. y.hardshrink(0.5) would become 0.5, which
        # verification refuses.
        value = given[0] if given else getattr(node.func, "value", None)
        if value is None or isinstance(value, ast.Starred):
            raise CannotRewriteError("its input cannot be distinguished from its other arguments")
        return value


def _is_at(call: ast.Call, site: Site) -> bool:
    """True if the call in the source is the site; before Python 3.11, if it looks like it."""
    if site.column is not None:
        return (call.end_lineno, call.end_col_offset) == (site.line, site.column)
    # Calls on the same line may differ in their names, as in F.leaky_relu(x) and y.relu_().
    names = [ast.unparse(call.func).rpartition(".")[2], site.callee]
    first, second = (name.replace("_", "").lower() for name in names)
    return call.lineno <= site.line <= (call.end_lineno or call.lineno) and first == second


def _compiled(function: types.FunctionType, text: str) -> types.FunctionType:
    """A function with new source and the globals, free variables and defaults of the original."""
    names = function.__qualname__.split(".")
    owner = names[-2] if len(names) > 1 and names[-2].isidentifier() else "_"
    free = ", ".join(name for name in function.__code__.co_freevars if name != "__class__")
    body = "\n".join("        " + line for line in text.splitlines())
    # Nested in a function and a class, like the original: for its free variables, for the __class__
    # of super() and for the mangling of its private names (self.__x).
    source = f"def _outer({free}):\n    class {owner}:\n{body}\n"
    checksum = zlib.crc32(text.encode())
    filename = f"<proxynorm {function.__module__}.{function.__qualname__} {checksum:08x}>"
    # inspect and torch.jit.script read the source from linecache
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    # dont_inherit: the __future__ imports of this file are not those of the original's file.
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
    del result.__wrapped__  # type: ignore[attr-defined]  # else inspect finds the original source
    result.__kwdefaults__ = function.__kwdefaults__
    return result
