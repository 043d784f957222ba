"""Python control flow in a form where a branch that depends on tensors can run both of its sides.

`continue`, `break` and `return` inside an `if` leave the statement half-way. What follows is moved into the
sides instead, so that every side runs to its end:

    if c: continue                  if c: pass
    rest                     ->     else: rest

    if c: return a                  if c: result = a
    rest; return b           ->     else: rest; result = b
                                    return result

A loop that is left from inside becomes a function that calls itself for the next item, so that what follows
the loop is the end of one side as well. The order of evaluation stays Python's.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Iterator, Sequence

#: Moving what follows into both sides doubles it, for each `if` that leaves on one side only now and then.
_MAX_NODES = 60_000
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_LEAVING = (ast.Return, ast.Raise, ast.Continue, ast.Break)


class TooLong(Exception):
    """The function would grow out of hand."""


def own(nodes: Sequence[ast.AST] | ast.AST, *, loops: bool = True) -> Iterator[ast.AST]:
    """All nodes of this function's own scope; without those inside of loops on demand."""
    pending = [nodes] if isinstance(nodes, ast.AST) else list(nodes)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, _SCOPES) or (not loops and isinstance(node, (ast.For, ast.While))):
            continue
        pending.extend(ast.iter_child_nodes(node))


def bound(nodes: Sequence[ast.AST] | ast.AST) -> set[str]:
    """Names that these statements bind or unbind."""
    names: set[str] = set()
    for node in own(nodes):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names - _comprehension_targets(nodes)


def _comprehension_targets(nodes: Sequence[ast.AST] | ast.AST) -> set[str]:
    """Bound in comprehensions and nowhere else: they live in scopes of their own."""
    inside: set[int] = set()
    targets: set[str] = set()
    everything = list(own(nodes))
    for node in everything:
        if isinstance(node, ast.comprehension):
            for each in ast.walk(node.target):
                inside.add(id(each))
                if isinstance(each, ast.Name):
                    targets.add(each.id)
    outside = {
        node.id
        for node in everything
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and id(node) not in inside
    }
    return targets - outside


def escapes(node: ast.AST | Sequence[ast.AST]) -> bool:
    """Whether a statement can be left half-way: by return, or by break or continue of the loop around it."""
    outer = list(own(node, loops=False))
    if any(isinstance(each, (ast.Return, ast.Continue, ast.Break)) for each in outer):
        return True
    return any(isinstance(each, ast.For) and left_from_inside(each) for each in outer)


def left_from_inside(loop: ast.For) -> bool:
    """Whether a loop ends before its last item somewhere."""
    for node in own(loop.body, loops=False):
        if isinstance(node, (ast.Return, ast.Break)):
            return True
        if isinstance(node, ast.For) and left_from_inside(node):
            return True
    return any(isinstance(node, ast.Return) for node in own(loop.body))


def leaves(body: Sequence[ast.stmt]) -> bool:
    """Whether nothing after these statements is reached from them."""
    if not body:
        return False
    last = body[-1]
    if isinstance(last, ast.If):
        return leaves(last.body) and leaves(last.orelse)
    return leaves(last.body) if isinstance(last, ast.With) else isinstance(last, _LEAVING)


class Normaliser:
    """One function's statements in normal form. Everything new takes the line of what it stands for."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.function = function
        self.numbers = itertools.count()
        self.names = sorted(
            bound(function.body)
            | {
                arg.arg
                for arg in (
                    *function.args.posonlyargs,
                    *function.args.args,
                    *function.args.kwonlyargs,
                    *filter(None, (function.args.vararg, function.args.kwarg)),
                )
            }
        )
        declared = [node for node in own(function.body) if isinstance(node, (ast.Global, ast.Nonlocal))]
        self.outside = {name for node in declared for name in node.names}
        self.declared: list[ast.stmt] = [copy.deepcopy(node) for node in declared]
        self.size = 0
        self.recursive = False

    def run(self) -> ast.FunctionDef:
        """The function, changed in place."""
        body = self.function.body
        if not leaves(body):
            body = [*body, _at(ast.Return(value=None), body[-1])]
        body = self._returns(self._block(body, None))
        if self.recursive:  # so that the nested functions find every name in the scope around them
            local = [name for name in self.names if name not in self.outside]
            never = [ast.Assign([ast.Name(name, ast.Store())], ast.Constant(None)) for name in local]
            binding = ast.If(ast.Constant(False), [*never, ast.Pass()], [])
            binding.binds_names = True  # type: ignore[attr-defined]
            body = [_at(binding, body[0]), *body]
        self.function.body = body
        return ast.fix_missing_locations(self.function)

    def _block(self, body: Sequence[ast.stmt], loop: tuple[str, str] | None) -> list[ast.stmt]:
        """Statements whose `if`s run to their ends.

        Args:
            body: ends where the function, or this turn of the loop, ends.
            loop: functions that go on with the next item and after the loop, where the loop is one.
        """
        done: list[ast.stmt] = []
        for position, stmt in enumerate(body):
            self.size += 1
            if self.size > _MAX_NODES:
                raise TooLong
            rest = list(body[position + 1 :])
            if isinstance(stmt, _LEAVING):
                return [*done, self._leave(stmt, loop)]
            if isinstance(stmt, ast.If) and escapes(stmt):
                sides = []
                for side in (stmt.body, stmt.orelse):
                    whole = list(side) if leaves(side) else [*side, *copy.deepcopy(rest)]
                    sides.append(self._block(whole, loop) or [_at(ast.Pass(), stmt)])
                return [*done, _at(ast.If(stmt.test, sides[0], sides[1]), stmt)]
            if isinstance(stmt, ast.For) and left_from_inside(stmt) and _convertible(stmt):
                return [*done, *self._recursion(stmt, rest, loop)]
            if isinstance(stmt, ast.With) and leaves(stmt.body):
                stmt.body = self._block(stmt.body, loop)
                return [*done, stmt]
            done.append(self._inside(stmt))
        return done

    def _inside(self, stmt: ast.stmt) -> ast.stmt:
        """A statement that runs to its end, its inner blocks in normal form."""
        if isinstance(stmt, ast.For):
            stmt.body = self._block(stmt.body, None) or [_at(ast.Pass(), stmt)]
            stmt.body = [_without_continue(each) for each in stmt.body]
            stmt.orelse = self._block(stmt.orelse, None)
        elif isinstance(stmt, ast.If):
            stmt.body = self._block(stmt.body, None)
            stmt.orelse = self._block(stmt.orelse, None)
        elif isinstance(stmt, ast.With) and not escapes(stmt):
            stmt.body = self._block(stmt.body, None)
        return stmt

    def _leave(self, stmt: ast.stmt, loop: tuple[str, str] | None) -> ast.stmt:
        if loop is None or not isinstance(stmt, (ast.Continue, ast.Break)):
            return stmt
        name = loop[0] if isinstance(stmt, ast.Continue) else loop[1]
        return _at(ast.Return(ast.Call(ast.Name(name, ast.Load()), [], [])), stmt)

    def _recursion(
        self, stmt: ast.For, rest: list[ast.stmt], outer: tuple[str, str] | None
    ) -> list[ast.stmt]:
        self.recursive = True
        number = next(self.numbers)
        source, loop, after = (f"__sparse_{what}_{number}" for what in ("items", "loop", "after"))
        body = [*stmt.body, *([] if leaves(stmt.body) else [_at(ast.Continue(), stmt)])]
        turn = _at(
            ast.For(stmt.target, ast.Name(source, ast.Load()), self._block(body, (loop, after)), []), stmt
        )
        ending = [*stmt.orelse, *([] if leaves(stmt.orelse) else [_call(after, stmt)])]
        rest = rest if leaves(rest) else [*rest, _at(ast.Continue() if outer else ast.Return(None), stmt)]
        return [
            _at(ast.Assign([ast.Name(source, ast.Store())], _started(stmt.iter)), stmt),
            self._nested(after, self._block(rest, outer), stmt),
            self._nested(loop, [turn, *self._block(ending, outer)], stmt),
            _call(loop, stmt),
        ]

    def _nested(self, name: str, body: list[ast.stmt], at: ast.stmt) -> ast.stmt:
        declared = [*copy.deepcopy(self.declared)]
        local = [each for each in self.names if each not in self.outside]
        if local:
            declared.append(ast.Nonlocal(names=local))
        for each in body:
            if isinstance(each, ast.For):
                each.body = self._returns(each.body)
        arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        function = ast.FunctionDef(
            name=name, args=arguments, body=[*declared, *self._returns(body)], decorator_list=[]
        )
        return _at(function, at)

    def _returns(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """`return`s of the sides as assignments, and one `return` at the end."""
        if not body or not isinstance(body[-1], (ast.If, ast.With)) or not _returning(body):
            return body
        name = f"__sparse_result_{next(self.numbers)}"
        self.names.append(name)
        last = _assigned(body[-1], name)
        return [*body[:-1], last, _at(ast.Return(ast.Name(name, ast.Load())), last)]


def _returning(body: Sequence[ast.stmt]) -> bool:
    """Whether all these statements do in the end is return or raise, by sides that all do."""
    last = body[-1] if body else None
    if isinstance(last, ast.If):
        return _returning(last.body) and _returning(last.orelse)
    return _returning(last.body) if isinstance(last, ast.With) else isinstance(last, (ast.Return, ast.Raise))


def _assigned(stmt: ast.stmt, name: str) -> ast.stmt:
    if isinstance(stmt, ast.Return):
        return _at(ast.Assign([ast.Name(name, ast.Store())], stmt.value or ast.Constant(None)), stmt)
    if isinstance(stmt, ast.If):
        stmt.body[-1] = _assigned(stmt.body[-1], name)
        stmt.orelse[-1] = _assigned(stmt.orelse[-1], name)
    elif isinstance(stmt, ast.With):
        stmt.body[-1] = _assigned(stmt.body[-1], name)
    return stmt


def _without_continue(stmt: ast.stmt) -> ast.stmt:
    """At the end of a turn `continue` does nothing."""
    if isinstance(stmt, ast.Continue):
        return _at(ast.Pass(), stmt)
    if isinstance(stmt, ast.If):
        stmt.body = [_without_continue(each) for each in stmt.body]
        stmt.orelse = [_without_continue(each) for each in stmt.orelse]
    return stmt


def _convertible(loop: ast.For) -> bool:
    """No exit from within `with`, `try` or `while`, which must run their own ends first."""
    blocks = (ast.With, ast.Try, ast.While)
    return not any(isinstance(node, blocks) and escapes(_statements(node)) for node in own(loop.body))


def _statements(node: ast.AST) -> list[ast.AST]:
    return list(ast.iter_child_nodes(node))


def _started(iterable: ast.expr) -> ast.expr:
    return ast.Call(
        ast.Attribute(ast.Name("__sparse", ast.Load()), "started", ast.Load()), [iterable], keywords=[]
    )


def _call(name: str, at: ast.stmt) -> ast.stmt:
    return _at(ast.Return(ast.Call(ast.Name(name, ast.Load()), [], [])), at)


def _at(new: ast.stmt, old: ast.AST) -> ast.stmt:
    ast.copy_location(new, old)
    for node in ast.walk(new):
        if "lineno" in node._attributes and not hasattr(node, "lineno"):
            ast.copy_location(node, old)
    return new
