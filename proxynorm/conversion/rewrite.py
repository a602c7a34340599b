"""Take single activation calls out of a forward, leaving the rest of it as written.

F.relu(self.bn(x)) and one self.relu behind norms and sums cannot be replaced as modules. Of the
ways to keep such a forward, a mark on tensors that already passed an activation does not survive
export and scripting, and a line per known class helps no user. So the call's source is replaced by
its argument, at the position where it was seen running, in a generated subclass of the module's
class. Everything else stays Python that runs: control flow, draws, attributes, caches.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import hashlib
import itertools
import linecache
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import nn

_MODULE = nn.modules.module.__file__
_PLUMBING = {_MODULE, nn.functional.__file__, torch.overrides.__file__, torch._tensor.__file__}
_COMPREHENSIONS = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"}


class CannotRewriteError(ValueError):
    """A call that cannot be taken out of its forward; the message says why."""


@dataclass(frozen=True)
class Site:
    """One call in a source file, made by a module's method.

    Attributes:
        owner: qualified name of the module whose method (or function attribute) makes the call;
            None if none does.
        code: the code object of that method.
        line, column: where the call's text ends, as Python's syntax tree counts; column is None
            before Python 3.11.
        callee: what is called, such as "relu", by which it is found where column is None.
    """

    owner: str | None
    code: types.CodeType
    line: int
    column: int | None
    callee: str

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.line}"


@dataclass(frozen=True)
class Edit:
    """Calls to take out of one function.

    Attributes:
        name: the function's attribute on the module or its class.
        ordinals: which of its calls, in the order of ast.walk.
        checksum: of the function's source, so that an unpickled module notices another version of
            it.
    """

    name: str
    ordinals: tuple[int, ...]
    checksum: str


def running_site(
    frame: types.FrameType | None, names: Mapping[nn.Module, str], callee: str, plumbing: str
) -> Site:
    """The innermost call in a method of the module that is running now.

    Helper functions are looked through: the call of the helper stands for what it does.

    Args:
        frame: where to begin.
        names: the network's modules, with their names.
        callee: what is called.
        plumbing: a further file whose functions are no helpers.
    """
    innermost = None
    while frame is not None and not (innermost and frame.f_code.co_filename == _MODULE):
        line, column = _call_end(frame)
        # before Python 3.12 a comprehension has a frame of its own
        while frame.f_code.co_name in _COMPREHENSIONS and frame.f_back is not None:
            frame = frame.f_back
        code = frame.f_code
        if code.co_filename not in (*_PLUMBING, plumbing):
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            owner = names.get(first) if isinstance(first, nn.Module) else None
            if owner is not None and first is not None and _function_of(first, code) is not None:
                return Site(owner, code, line, column, callee)
            innermost = innermost or Site(None, code, line, column, callee)
            callee = code.co_name
        frame = frame.f_back
    assert innermost is not None, "no call is running"
    return innermost


def _call_end(frame: types.FrameType) -> tuple[int, int | None]:
    """Line and column where the text of the running call ends.

    The column is None before Python 3.11.
    """
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return frame.f_lineno, None
    _, line, _, column = next(itertools.islice(positions(), frame.f_lasti // 2, None))
    return line or frame.f_lineno, column


class RewrittenModule:
    """Mixin of generated classes.

    Makes their objects copy and pickle by the original class and the edits.
    """

    _original: type[nn.Module]
    _edits: tuple[Edit, ...]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _blank, (self._original, self._edits), self.__dict__


def plan_edits(module: nn.Module, sites: Iterable[Site]) -> list[Edit]:
    """The edits of one module's functions that take out the calls at the given sites.

    Raises:
        CannotRewriteError: a call is in no method of the module, or its source cannot be found.
    """
    by_code: dict[types.CodeType, list[Site]] = {}
    for site in sites:
        by_code.setdefault(site.code, []).append(site)
    return [_edit(module, code, group) for code, group in by_code.items()]


def apply_edits(module: nn.Module, edits: Iterable[Edit]) -> None:
    """Make the module run its edited functions, in place.

    Those of its class in a generated subclass.
    """
    of_class = []
    for edit in edits:
        if edit.name in vars(module):
            setattr(module, edit.name, edited_function(vars(module)[edit.name], edit))
        else:
            of_class.append(edit)
    if of_class:
        module.__class__ = _rewritten_class(type(module), tuple(of_class))  # type: ignore[arg-type]


@functools.cache
def _rewritten_class(original: Any, edits: tuple[Edit, ...]) -> type[nn.Module]:
    namespace: dict[str, object] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original": original,
        "_edits": edits,
    }
    for edit in edits:
        namespace[edit.name] = edited_function(getattr(original, edit.name), edit)
    return type(original.__name__, (RewrittenModule, original), namespace)


def _blank(original: Any, edits: tuple[Edit, ...]) -> nn.Module:
    """An object of the rewritten class without state, for copying and unpickling."""
    rewritten = _rewritten_class(original, edits)
    return rewritten.__new__(rewritten)


def _edit(module: nn.Module, code: types.CodeType, sites: list[Site]) -> Edit:
    if isinstance(module, RewrittenModule):
        raise CannotRewriteError("an earlier conversion rewrote it: convert the original model")
    found = _function_of(module, code)
    if found is None:
        raise CannotRewriteError("it is no method of a module, or is decorated")
    name, function = found
    node = _source_node(function, sites)
    calls = [child for child in ast.walk(node) if isinstance(child, ast.Call)]
    ordinals = []
    for site in sites:
        at = [i for i, call in enumerate(calls) if _is_at(call, site)]
        if len(at) != 1:
            told = "is not found in the source"
            if site.column is None:
                told = "is not told from others on its line: Python 3.11 and later can"
            raise CannotRewriteError(f"the call {told}")
        ordinals.append(at[0])
    return Edit(name, tuple(sorted(set(ordinals))), _checksum(node))


def _function_of(module: nn.Module, code: types.CodeType) -> tuple[str, types.FunctionType] | None:
    """Name and function, of the module or its class, that runs the code."""
    for namespace in (vars(module), *(vars(kind) for kind in type(module).__mro__)):
        for name, value in namespace.items():
            if isinstance(value, types.FunctionType) and value.__code__ is code:
                return name, value
    return None


def _is_at(call: ast.Call, site: Site) -> bool:
    if site.column is not None:
        return (call.end_lineno, call.end_col_offset) == (site.line, site.column)
    # the line alone does not tell calls apart, their names may: F.leaky_relu(x), y.relu_()
    names = [ast.unparse(call.func).rpartition(".")[2], site.callee]
    first, second = (name.replace("_", "").lower() for name in names)
    return call.lineno <= site.line <= (call.end_lineno or call.lineno) and first == second


def _source_node(function: types.FunctionType, sites: Iterable[Site] = ()) -> ast.AST:
    """The syntax tree of a function or lambda."""
    first = function.__code__.co_firstlineno
    found = [
        node
        for node in ast.walk(_parsed(function.__code__.co_filename))
        if isinstance(node, (ast.FunctionDef, ast.Lambda))
        and first in (node.lineno, *(d.lineno for d in getattr(node, "decorator_list", [])))
        and getattr(node, "name", "<lambda>") == function.__name__
        and all(any(_is_at(c, s) for c in ast.walk(node) if isinstance(c, ast.Call)) for s in sites)
    ]
    if not found:
        raise CannotRewriteError("its source is not at hand")
    return found[-1]  # ast.walk goes from outer to inner


@functools.lru_cache(maxsize=64)
def _parsed(filename: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError as error:
        raise CannotRewriteError("its source is not at hand") from error


def _checksum(node: ast.AST) -> str:
    return hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:12]


class _TakeOut(ast.NodeTransformer):
    """Replaces the chosen calls by their input."""

    def __init__(self, chosen: list[ast.Call]) -> None:
        self.chosen = chosen

    def visit_Call(self, node: ast.Call) -> ast.AST:
        is_chosen = any(node is call for call in self.chosen)
        self.generic_visit(node)
        if not is_chosen:
            return node
        given = [*node.args, *(k.value for k in node.keywords if k.arg in ("input", "x"))]
        # y.relu() has its input before the dot; y.hardshrink(0.5) is verified against the original,
        # and refused
        value = given[0] if given else getattr(node.func, "value", None)
        if value is None or isinstance(value, ast.Starred):
            raise CannotRewriteError("its input is not told from its other arguments")
        return value


def edited_function(function: types.FunctionType, edit: Edit) -> types.FunctionType:
    """The function without the edit's calls.

    It shares the original's globals, closure and defaults.

    Raises:
        CannotRewriteError: the source is not that of which the edit was made.
    """
    node = _source_node(function)
    if _checksum(node) != edit.checksum:
        raise CannotRewriteError(
            f"the source of {function.__qualname__} changed since its network was converted: "
            "convert it again"
        )
    node = copy.deepcopy(node)
    calls = [child for child in ast.walk(node) if isinstance(child, ast.Call)]
    _TakeOut([calls[i] for i in edit.ordinals]).visit(node)
    if isinstance(node, ast.FunctionDef):
        node.decorator_list = []
    return _compiled(function, ast.unparse(ast.fix_missing_locations(node)), edit)


def _compiled(function: types.FunctionType, text: str, edit: Edit) -> types.FunctionType:
    """Compile a function's new text where it stood.

    In a class of that name, with the same free variables.
    """
    if text.startswith("lambda"):
        text = f"_ = {text}"
    names = function.__qualname__.split(".")
    owner = names[-2] if len(names) > 1 and names[-2].isidentifier() else "_"
    free = ", ".join(name for name in function.__code__.co_freevars if name != "__class__")
    body = "\n".join("        " + line for line in text.splitlines())
    source = f"def _outer({free}):\n    class {owner}:\n{body}\n"
    filename = (
        f"<proxynorm {function.__module__}.{function.__qualname__} {edit.checksum} {edit.ordinals}>"
    )
    # inspect and torch.jit.script read the source from here
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(source, filename, "exec", flags=flags, dont_inherit=True)
    for name in ("_outer", owner, function.__name__):
        code = next(
            c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name
        )
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    closure = tuple(cells[name] for name in code.co_freevars)
    defaults = function.__defaults__
    result = types.FunctionType(code, function.__globals__, function.__name__, defaults, closure)
    # not functools.wraps: through its __wrapped__, inspect would find the original's source
    for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__", "__qualname__"):
        setattr(result, name, getattr(function, name))
    result.__dict__.update(function.__dict__)
    return result
