"""The nodes of a function's source in the form that `rewrite` gives them."""

from __future__ import annotations

import ast
import copy
import itertools
from typing import Any

from sparse_onnx.export.lifting import normal_form

RUNTIME = "__sparse"
#: Errors that say something of the code, whatever the tensors hold.
_OF_CODE = frozenset(
    ["ImportError", "ModuleNotFoundError", "AttributeError", "NotImplementedError", "NameError", "TypeError"]
)
#: Read their caller's frame, which must stay the user's own.
_FRAME_READERS = frozenset({"super", "locals", "globals", "vars", "dir", "eval", "exec"})


class Rewriter(ast.NodeTransformer):
    """Puts a function's branches, loops and calls into the runtime's hands; `rewrite` says how."""

    def __init__(self, filename: str, lines: list[str]) -> None:
        self.filename, self.lines = filename, lines
        self.numbers = itertools.count()
        self.branched: set[str] = set()
        self.loads: dict[str, list[ast.AST]] = {}

    def function(self, tree: ast.FunctionDef) -> ast.FunctionDef:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self.loads.setdefault(node.id, []).append(node)
            if isinstance(node, ast.If) and not normal_form.escapes([*node.body, *node.orelse]):
                self.branched |= normal_form.bound([*node.body, *node.orelse])
            elif isinstance(node, ast.For):
                self.branched |= normal_form.bound(node.body)
        tree.body = self._block(tree.body)
        return tree

    def _block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        done: list[ast.stmt] = []
        for stmt in body:
            new = self.visit(stmt)
            done += new if isinstance(new, list) else [new]
        return done

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        if getattr(node, "binds_names", False):
            return node
        _asks_truth(node.test)
        place, inside = self._place(node), [*node.body, *node.orelse]
        names = self._names(inside)
        test = self.visit(node.test)
        whole = not normal_form.escapes(inside) and not any(
            isinstance(n, ast.Return) for n in normal_form.own(inside)
        )
        node.body, node.orelse = self._block(node.body), self._block(node.orelse)
        if not whole:
            node.test = self._ask("concrete", test, place)
            return node
        return self._branch(node, test, place, names)

    def _names(self, inside: list[ast.stmt]) -> tuple[list[str], frozenset[str]]:
        """Names that statements bind, and those of them that are read somewhere else, or before."""
        names = normal_form.bound(inside)
        own = {id(node) for stmt in inside for node in ast.walk(stmt)}
        read = {name for name in names if any(id(node) not in own for node in self.loads.get(name, ()))}
        for stmt in inside:
            for node in ast.walk(stmt):
                if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                    read.add(node.target.id)
        return sorted(names), frozenset(read)

    def _branch(
        self, node: ast.stmt, test: ast.expr, place: ast.expr, bound: tuple[list[str], frozenset[str]]
    ) -> list[ast.stmt]:
        names, read_later = bound
        assert isinstance(node, ast.If)
        branch = f"__sparse_branch_{next(self.numbers)}"
        read = ast.Name(branch, ast.Load())
        side = ast.If(ast.Attribute(read, "side", ast.Load()), node.body, node.orelse)
        values: list[ast.stmt] = [
            ast.Assign([ast.Name(name, ast.Store())], self._method(branch, "value", ast.Constant(name)))
            for name in names
        ]
        turn = [side, ast.Expr(self._method(branch, "leave", _locals())), *values]
        about: list[Any] = [tuple(names), read_later]
        made = self._ask("branch", test, place, _locals(), *map(ast.Constant, about))
        return _located(
            [
                ast.Assign([ast.Name(branch, ast.Store())], made),
                ast.While(self._method(branch, "more"), turn, []),
            ],
            node,
        )

    def visit_For(self, node: ast.For) -> ast.stmt:
        place, names = self._place(node), self._names(node.body)
        escaping = normal_form.escapes(node.body) or any(
            isinstance(each, ast.Return) for each in normal_form.own(node.body)
        )
        ours = isinstance(node.iter, ast.Name) and node.iter.id.startswith("__sparse_items")
        iterable = node.iter if ours else self.visit(node.iter)
        node.target = self.visit(node.target)
        body = self._block(node.body)
        node.orelse = self._block(node.orelse)
        if ours or escaping:
            node.iter = iterable if ours else self._ask("plainly", iterable, place)
            node.body = body
            return node
        node.iter = self._ask("iterate", iterable, place)
        present = ast.copy_location(ast.If(ast.Constant(True), body, []), node)
        node.body = self._branch(present, self._ask("present"), place, names)
        return node

    def visit_While(self, node: ast.While) -> ast.stmt:
        _asks_truth(node.test)
        node.test = self._ask("concrete", self.visit(node.test), self._place(node))
        node.body, node.orelse = self._block(node.body), self._block(node.orelse)
        return node

    def visit_Try(self, node: ast.Try) -> ast.stmt:
        """An error that the trace makes is not the user's to handle, nor one that depends on values."""
        place, handlers = self._place(node), node.handlers
        caught = [self._place(handler) for handler in handlers]
        self.generic_visit(node)
        for handler, at in zip(handlers, caught, strict=True):
            handler.body.insert(0, ast.Expr(self._ask("caught", at)))
        if handlers:
            of_values = ast.Constant(not all(_is_of_code(handler.type) for handler in handlers))
            entered = [ast.withitem(self._ask("trying", place, of_values), None)]
            node.body = [ast.With(entered, node.body)]
        return _located([node], node)[0]

    def visit_Match(self, node: ast.Match) -> ast.stmt:
        """What `matching` leaves as it is."""
        place = self._place(node)
        self.generic_visit(node)
        node.subject = self._ask("matched", node.subject, place)
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        place = self._place(node)
        _asks_truth(node.test)
        holds = self._ask("asserted", self.visit(node.test), place)
        message = [self.visit(node.msg)] if node.msg else []
        error = ast.Raise(ast.Call(ast.Name("AssertionError", ast.Load()), message, []), None)
        return _located([ast.If(ast.UnaryOp(ast.Not(), holds), [error], [])], node)[0]

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        self.generic_visit(node)
        goes_on = self._ask("refuses", self._place(node))
        return _located([ast.If(ast.UnaryOp(ast.Not(), goes_on), [node], [])], node)[0]

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        place = self._place(node)
        _asks_truth(node.test)
        self.generic_visit(node)
        if _binds(node):
            node.test = self._ask("concrete", node.test, place)
            return node
        return self._ask("select", node.test, _thunk(node.body), _thunk(node.orelse), place)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        place = self._place(node)
        self.generic_visit(node)
        if _binds(node):
            node.values = [self._ask("concrete", value, place) for value in node.values[:-1]] + node.values[
                -1:
            ]
            return node
        what = "both" if isinstance(node.op, ast.And) else "either"
        asks = ast.Constant(getattr(node, "asks_truth", False))
        return self._ask(what, place, asks, *[_thunk(value) for value in node.values])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if isinstance(node.op, ast.Not):
            _asks_truth(node.operand)
        self.generic_visit(node)
        return self._ask("negated", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        place = self._place(node)
        self.generic_visit(node)
        if isinstance(node.op, (ast.FloorDiv, ast.Mod)):
            what = "quotient" if isinstance(node.op, ast.FloorDiv) else "remainder"
            return self._ask(what, node.left, node.right, place)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        place = self._place(node)
        self.generic_visit(node)
        if isinstance(node.op, (ast.FloorDiv, ast.Mod)) and isinstance(node.target, ast.Name):
            target = ast.Name(node.target.id, ast.Load())
            node.value = self._ask("divisor", target, node.value, place)
        return ast.fix_missing_locations(node)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        place = self._place(node)
        if len(node.ops) > 1 and all(
            isinstance(each, (ast.Name, ast.Constant)) for each in node.comparators[:-1]
        ):
            return self.visit(_pairs(node))  # type: ignore[no-any-return]
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            found = self._ask("contains", node.comparators[0], node.left, place)
            return found if isinstance(node.ops[0], ast.In) else self._ask("negated", found)
        truths = [each for each in (node.left, *node.comparators) if _is_truth(each)]
        if len(node.ops) == 1 and isinstance(node.ops[0], (ast.Is, ast.IsNot)) and truths:
            node.left = self._ask("itself", node.left, place)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        place = self._place(node)
        self.generic_visit(node)
        number = isinstance(node.ctx, ast.Load) and isinstance(
            node.slice, (ast.Name, ast.Attribute, ast.Call)
        )
        return self._ask("picked", node.value, node.slice, place) if number else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        place = self._place(node)
        return self._ask("text", self._shown(node), place)

    def _shown(self, node: ast.JoinedStr) -> ast.expr:
        for each in node.values:
            if isinstance(each, ast.FormattedValue):
                each.value = self._ask("shown", self.visit(each.value))
                if isinstance(each.format_spec, ast.JoinedStr):
                    self._shown(each.format_spec)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        known = node.func.id if isinstance(node.func, ast.Name) else ""
        if known.startswith("__sparse") and isinstance(node.func, ast.Name):
            return node
        if isinstance(node.func, ast.Attribute) and _is_runtime(node.func.value):
            node.args = [*(self.visit(arg) for arg in node.args), self._place(node)]  # `started`
            return node
        place = self._place(node)
        self.generic_visit(node)
        if known not in _FRAME_READERS:
            node.func = self._ask("call", node.func, place)
        return node

    def visit_List(self, node: ast.List) -> ast.expr:
        self.generic_visit(node)
        return self._ask("list", node) if isinstance(node.ctx, ast.Load) and not node.elts else node

    def visit_comprehension(self, node: ast.comprehension) -> ast.comprehension:
        place = self._place(node.iter)
        for test in node.ifs:
            _asks_truth(test)
        self.generic_visit(node)
        node.iter = self._ask("plainly", node.iter, place)
        node.ifs = [self._ask("concrete", test, place) for test in node.ifs]
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.branched and not node.id.startswith("__sparse"):
            return ast.copy_location(self._ask("read", node), node)
        return node

    def visit_Delete(self, node: ast.Delete) -> ast.stmt:
        return node

    def _place(self, node: ast.AST) -> ast.expr:
        line = getattr(node, "lineno", 0)
        text = self.lines[line - 1].strip() if 0 < line <= len(self.lines) else ""
        return ast.Constant((self.filename, line, text))  # type: ignore[arg-type]

    def _ask(self, what: str, *args: ast.expr) -> ast.expr:
        called = ast.Call(
            ast.Attribute(ast.Name(RUNTIME, ast.Load()), what, ast.Load()), list(args), keywords=[]
        )
        for arg in args:
            if hasattr(arg, "lineno"):
                return _placed(called, arg)
        return called

    def _method(self, name: str, what: str, *args: ast.expr) -> ast.expr:
        return ast.Call(ast.Attribute(ast.Name(name, ast.Load()), what, ast.Load()), list(args), keywords=[])


def _asks_truth(test: ast.expr) -> None:
    """Notes of `and` and `or` that only their truth is asked for."""
    if isinstance(test, ast.BoolOp):
        test.asks_truth = True  # type: ignore[attr-defined]
        for value in test.values:
            _asks_truth(value)
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        _asks_truth(test.operand)


def _pairs(node: ast.Compare) -> ast.expr:
    """`a < b < c` as `a < b and b < c`."""
    terms = [node.left, *node.comparators]
    each = [
        ast.Compare(copy.deepcopy(left), [op], [right])
        for left, op, right in zip(terms[:-1], node.ops, terms[1:], strict=True)
    ]
    joined = ast.BoolOp(ast.And(), each)  # type: ignore[arg-type]
    joined.asks_truth = True  # type: ignore[attr-defined]
    return _placed(joined, node)


def _is_truth(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _is_of_code(kind: ast.expr | None) -> bool:
    """Whether a handler is for errors that no tensor's values lead to."""
    if isinstance(kind, ast.Tuple):
        return all(_is_of_code(each) for each in kind.elts)
    return isinstance(kind, ast.Name) and kind.id in _OF_CODE


def _is_runtime(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == RUNTIME


def _binds(node: ast.AST) -> bool:
    return any(isinstance(each, (ast.NamedExpr, ast.Await)) for each in ast.walk(node))


def _thunk(value: ast.expr) -> ast.expr:
    arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return _placed(ast.Lambda(arguments, value), value)


def _locals() -> ast.expr:
    return ast.Call(ast.Name("locals", ast.Load()), [], [])


def _placed(new: ast.expr, old: ast.AST) -> ast.expr:
    for node in ast.walk(new):
        if "lineno" in node._attributes and not hasattr(node, "lineno"):
            ast.copy_location(node, old)
    return new


def _located(new: list[Any], old: ast.AST) -> list[Any]:
    for stmt in new:
        for node in ast.walk(stmt):
            if "lineno" in node._attributes and not hasattr(node, "lineno"):
                ast.copy_location(node, old)
    return new
