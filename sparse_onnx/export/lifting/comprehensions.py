"""`[expert(rows) for expert, rows in pairs if rows.numel()]` as a loop, whose `if` may depend on tensors.

outs = [f(c) for c in chunks if c.numel()]     def listed(items):
                                                   made = []
                                        ->         for c in items:
                                                       if c.numel(): made.append(f(c))
                                                   return made
                                               outs = listed(chunks)
"""

from __future__ import annotations

import ast
import itertools
from typing import Any


def as_loops(tree: ast.FunctionDef) -> None:
    """Changes a function in place."""
    _Comprehensions().visit(tree)
    ast.fix_missing_locations(tree)


class _Comprehensions(ast.NodeTransformer):
    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.made: list[ast.stmt] = []

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, ast.stmt):
            return super().visit(node)
        outer, self.made = self.made, []
        new = super().visit(node)
        made, self.made = self.made, outer
        return [*made, new] if made and new is not None else new

    def visit_ListComp(self, node: ast.ListComp) -> ast.expr:
        first, bound = node.generators[0], any(isinstance(each, ast.NamedExpr) for each in ast.walk(node))
        if len(node.generators) > 1 or not first.ifs or first.is_async or bound:
            return node  # what is inside has names of this comprehension's own
        number = next(self.numbers)
        name, items, made = (f"_sparse_{what}_{number}" for what in ("listed", "from", "made"))
        body: list[ast.stmt] = [
            ast.Expr(
                ast.Call(ast.Attribute(ast.Name(made, ast.Load()), "append", ast.Load()), [node.elt], [])
            )
        ]
        for test in reversed(first.ifs):
            body = [ast.If(test, body, [])]
        arguments = ast.arguments(
            posonlyargs=[], args=[ast.arg(items)], kwonlyargs=[], kw_defaults=[], defaults=[]
        )
        function = ast.FunctionDef(
            name=name,
            args=arguments,
            body=[
                ast.Assign([ast.Name(made, ast.Store())], ast.List([], ast.Load())),
                ast.For(first.target, ast.Name(items, ast.Load()), body, []),
                ast.Return(ast.Name(made, ast.Load())),
            ],
            decorator_list=[],
        )
        for each in ast.walk(function):
            if "lineno" in each._attributes and not hasattr(each, "lineno"):
                ast.copy_location(each, node)
        self.made.append(function)
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), [self.visit(first.iter)], []), node)

    def _left(self, node: Any) -> Any:
        return node

    visit_Lambda = visit_SetComp = visit_DictComp = visit_GeneratorExp = _left
