"""A function's source rewritten so that a runtime decides about each of its branches, loops and calls.

    if test: A          branch = runtime.branch(test, place, locals())
    else: B      ->     while branch.more():
                            if branch.side: A
                            else: B
                            branch.leave(locals())
                            name = branch.value('name')      for each name that A or B binds

A condition that is a Python value takes one side, as ever. One that depends on tensors takes both, one after
the other from the same state, and the runtime merges what they leave.

The new code keeps the file name and the lines of the old one, so that tracebacks name the user's code.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import Any

from sparse_onnx.export.lifting import comprehensions, matching, normal_form
from sparse_onnx.export.lifting.rewriter import RUNTIME, Rewriter


class NoSource(Exception):
    """The function cannot be rewritten; says why."""


def rewritten(function: types.FunctionType, runtime: Any) -> types.FunctionType:
    """The function with its control flow in the runtime's hands; closure, globals and defaults are shared.

    Raises:
        NoSource: its source is not to be had, or of a kind that is not understood.
    """
    tree, name = _parsed(function)
    matching.as_ifs(tree)
    comprehensions.as_loops(tree)
    try:
        for node in reversed(list(ast.walk(tree))):
            if isinstance(node, ast.FunctionDef) and not _is_generator(node):
                normal_form.Normaliser(node).run()
    except normal_form.TooLong:
        raise NoSource("its control flow is too long") from None
    tree = Rewriter(function.__code__.co_filename, _lines(function)).function(tree)
    free = [each for each in function.__code__.co_freevars if each != RUNTIME]
    factory = ast.FunctionDef(
        name="__sparse_factory",
        args=_arguments([RUNTIME, *free]),
        body=[tree, ast.Return(ast.Name(name, ast.Load()))],
        decorator_list=[],
    )
    module = ast.fix_missing_locations(ast.Module([factory], type_ignores=[]))
    try:
        outer = compile(
            module, function.__code__.co_filename, "exec", dont_inherit=True, flags=_flags(function)
        )
    except SyntaxError as error:
        raise NoSource(f"its source cannot be compiled again: {error.msg}") from None
    code = _code_of(_code_of(outer, "__sparse_factory"), name)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[RUNTIME] = types.CellType(runtime)
    new = types.FunctionType(
        code, function.__globals__, function.__name__, None, tuple(cells[each] for each in code.co_freevars)
    )
    new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    new.__qualname__, new.__module__ = function.__qualname__, function.__module__
    new.__dict__.update(function.__dict__)  # a decorator's `__wrapped__` tells the signature
    return new


def _parsed(function: types.FunctionType) -> tuple[ast.FunctionDef, str]:
    try:
        lines, first = inspect.getsourcelines(function.__code__)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, IndentationError) as error:
        raise NoSource("its source is not available") from error
    found = tree.body[0] if len(tree.body) == 1 else None
    if not isinstance(found, ast.FunctionDef) or found.name != function.__code__.co_name:
        raise NoSource("it is no plain function" if found is not None else "its source is not available")
    own = list(normal_form.own(found.body))
    if _is_generator(found):
        raise NoSource("it is a generator")
    if _assigns_to_globals_in_blocks(found, own):
        raise NoSource("it assigns to globals")
    ast.increment_lineno(tree, first - 1)
    # Decorators have been applied to what was found; annotations and defaults belong to the old function.
    found.decorator_list, found.returns = [], None
    for arg in ast.walk(found.args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    nothing = ast.Constant(None)
    found.args.defaults = [nothing for _ in found.args.defaults]
    found.args.kw_defaults = [default and nothing for default in found.args.kw_defaults]
    return found, _mangled(found, function)


def _assigns_to_globals_in_blocks(found: ast.FunctionDef, own: list[ast.AST]) -> bool:
    """Whether an assignment to a global may be on one side of a branch only, which nothing would undo."""
    names = {name for node in own if isinstance(node, ast.Global) for name in node.names}
    simple = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Global, ast.Expr, ast.Return)
    blocks = [stmt for stmt in found.body if not isinstance(stmt, simple)]
    return bool(names) and (
        any(normal_form.escapes(stmt) for stmt in blocks) or bool(normal_form.bound(blocks) & names)
    )


def _is_generator(function: ast.FunctionDef) -> bool:
    kinds = (ast.Yield, ast.YieldFrom, ast.Await)
    return any(isinstance(node, kinds) for node in normal_form.own(function.body))


def _mangled(found: ast.FunctionDef, function: types.FunctionType) -> str:
    """Names such as `self.__x` are the class's own, which is not there when the method is compiled alone."""
    parts = function.__qualname__.split(".")
    owner = parts[-2].lstrip("_") if len(parts) > 1 and parts[-2] != "<locals>" else ""

    def private(name: str) -> str:
        hidden = name.startswith("__") and not name.endswith("__")
        return f"_{owner}{name}" if owner and hidden else name

    for node in ast.walk(found):
        if isinstance(node, ast.Attribute):
            node.attr = private(node.attr)
        elif isinstance(node, ast.Name):
            node.id = private(node.id)
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            node.arg = private(node.arg)
    return found.name


def _lines(function: types.FunctionType) -> list[str]:
    try:
        return inspect.findsource(function.__code__)[0]
    except OSError:
        return []


def _flags(function: types.FunctionType) -> int:
    return function.__code__.co_flags & 0x1FE0000  # those of `from __future__`


def _arguments(names: list[str]) -> ast.arguments:
    return ast.arguments(
        posonlyargs=[], args=[ast.arg(name) for name in names], kwonlyargs=[], kw_defaults=[], defaults=[]
    )


def _code_of(outer: types.CodeType, name: str) -> types.CodeType:
    return next(
        const for const in outer.co_consts if isinstance(const, types.CodeType) and const.co_name == name
    )
