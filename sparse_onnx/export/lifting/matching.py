"""`match` as a chain of `if`, where its cases are values, alternatives of values, and names.

    match rows.numel():             subject = rows.numel()
        case 0: A            ->     if subject == 0: A
        case n: B                   else: n = subject; B

Patterns of classes, sequences and mappings stay: what they ask is answered by Python alone.
"""

from __future__ import annotations

import ast
import itertools


def as_ifs(tree: ast.FunctionDef) -> None:
    """Changes a function in place."""
    _Matches().visit(tree)
    ast.fix_missing_locations(tree)


class _Matches(ast.NodeTransformer):
    def __init__(self) -> None:
        self.numbers = itertools.count()

    def visit_Match(self, node: ast.Match) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        name = f"__sparse_subject_{next(self.numbers)}"
        chain: list[ast.stmt] = []
        for case in reversed(node.cases):
            side = _side(case, name)
            if side is None:
                return node
            test, body = side
            chain = body if test is None else [ast.copy_location(ast.If(test, body, chain), case.pattern)]
        subject = ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], node.subject), node)
        return [subject, *chain]


def _side(case: ast.match_case, name: str) -> tuple[ast.expr | None, list[ast.stmt]] | None:
    """A case's test, None for one that always holds, and its statements; None where no `if` says the same."""
    found = _test(case.pattern, name)
    if found is None:
        return None
    test, captured = found
    if case.guard is not None:
        if captured:  # the guard may ask for them
            return None
        test = case.guard if test is None else ast.BoolOp(ast.And(), [test, case.guard])
    bound: list[ast.stmt] = [
        ast.copy_location(ast.Assign([ast.Name(each, ast.Store())], ast.Name(name, ast.Load())), case.pattern)
        for each in captured
    ]
    return test, [*bound, *case.body]


def _test(pattern: ast.pattern, name: str) -> tuple[ast.expr | None, list[str]] | None:
    """The truth that a pattern asks for, and the names that it binds."""
    subject = ast.Name(name, ast.Load())
    if isinstance(pattern, ast.MatchValue):
        return ast.Compare(subject, [ast.Eq()], [pattern.value]), []
    if isinstance(pattern, ast.MatchSingleton):
        return ast.Compare(subject, [ast.Is()], [ast.Constant(pattern.value)]), []
    if isinstance(pattern, ast.MatchOr):
        found = [_test(each, name) for each in pattern.patterns]
        tests = [each[0] for each in found if each is not None and each[0] is not None and not each[1]]
        return (ast.BoolOp(ast.Or(), tests), []) if len(tests) == len(found) else None
    if not isinstance(pattern, ast.MatchAs):
        return None
    inner = (None, []) if pattern.pattern is None else _test(pattern.pattern, name)
    return None if inner is None else (inner[0], [*inner[1], *filter(None, [pattern.name])])
