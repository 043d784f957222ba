"""What is known of a program's tensors where a condition is not met.

Three kinds of facts: a tensor (or its slice at some index) is all zero or false; it holds a certain integer
nowhere; a size is 0. `assume_*` derives facts from a condition, backwards through the operators that led to
it: `mask.any()` is false, hence `mask` is all false; `mask` was `index == 3`, hence `index` holds no 3. The
questions `zero`, `lacks` and `empty` go forward again, from these facts to other tensors.

Every step is an equivalence of the operators involved, on tensors that were not written to in between.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch import Tensor, fx

from sparse_onnx.export.lifting import views
from sparse_onnx.export.lifting.known import (
    ALL,
    DEPTH,
    REDUCTIONS,
    At,
    Known,
    negated,
    number_of,
)
from sparse_onnx.export.lifting.program import expression, is_bool, is_integer, name_of, value_of


class Facts(Known):
    """Facts of one program, derived from one condition."""

    def assume(self, condition: Any, truth: bool) -> None:
        """A condition of the trace - a tensor's node, or a size's or truth's formula - that is so."""
        if isinstance(condition, fx.Node):
            value = value_of(condition)
            if isinstance(value, Tensor):
                self.assume_true(condition) if truth else self.assume_zero(condition)
                return
            condition = expression(condition)
        if condition is not None:
            self._assume_formula(condition if truth else negated(condition))

    def assume_zero(self, node: fx.Node, at: At = ALL, depth: int = 0) -> None:
        """All of the tensor, or of its slice, is zero or false."""
        node, at = views.base(self.program, node, at)
        self._zero.append((node, dict(at)))
        if depth > DEPTH or not self.program.current(node):
            return
        name, source = name_of(node), node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return
        if not self.program.unchanged_since(source, node) and not self._marks(node):
            return
        follow = depth + 1
        if name in REDUCTIONS:
            inner = views.before_reduction(node, at)
            adds_up = name != "aten::sum" or views.is_wide(value_of(node).dtype)  # not to 0 by wrapping
            if inner is not None and (
                name in ("aten::any", "aten::count_nonzero") or (adds_up and self.non_negative(source))
            ):
                self.assume_zero(source, inner, follow)
        elif name in ("aten::gt", "aten::ne", "aten::ge"):
            other = node.args[1]
            least = 1 if name == "aten::ge" else 0
            whole = least == 0 or is_integer(source)
            if number_of(other) == least and whole and (name == "aten::ne" or self.non_negative(source)):
                self.assume_zero(source, at, follow)
        elif name in ("aten::item", "aten::_local_scalar_dense"):
            self.assume_zero(source, ALL, follow)
        elif name in ("aten::logical_not", "aten::bitwise_not"):
            if not at and (name == "aten::logical_not" or is_bool(source)):
                self.assume_true(source, follow)
        elif name in ("aten::logical_or", "aten::bitwise_or"):
            for each in node.args[:2]:
                if isinstance(each, fx.Node) and not at and self.program.unchanged_since(each, node):
                    self.assume_zero(each, ALL, follow)
        else:
            self._assume_no_match(node, at, follow)

    def _assume_no_match(self, node: fx.Node, at: At, depth: int) -> None:
        """Of `index == expert` and its kin: the expert is nowhere in the index."""
        for index, inner, expert in self._matches(node, at):
            self.assume_lacks(index, inner, expert, depth)

    def assume_lacks(self, node: fx.Node, at: At, number: int, depth: int = 0) -> None:
        """The tensor, or its slice, holds this integer nowhere."""
        node, at = views.base(self.program, node, at)
        self._lacks.append((node, dict(at), number))
        source = views.same_values(node)
        if source is not None and depth < DEPTH and self.program.unchanged_since(source, node):
            self.assume_lacks(source, ALL, number, depth + 1)

    def assume_true(self, node: fx.Node, depth: int = 0) -> None:
        """No element of the tensor is zero or false."""
        node, at = views.base(self.program, node, ALL)
        name, source = name_of(node), node.args[0] if node.args else None
        if at or depth > DEPTH or not isinstance(source, fx.Node):
            return
        if not self.program.current(node) or not self.program.unchanged_since(source, node):
            return
        if name == "aten::logical_not" or (name == "aten::bitwise_not" and is_bool(source)):
            self.assume_zero(source, ALL, depth + 1)
        elif name in ("aten::all", "aten::item", "aten::_local_scalar_dense"):
            self.assume_true(source, depth + 1)
        elif name in ("aten::logical_and", "aten::bitwise_and") and is_bool(node):
            for each in node.args[:2]:
                if isinstance(each, fx.Node) and self.program.unchanged_since(each, node):
                    self.assume_true(each, depth + 1)
        elif name in ("aten::eq", "aten::le", "aten::lt"):
            limit = 1 if name == "aten::lt" else 0
            whole = name != "aten::lt" or is_integer(source)
            if (
                number_of(node.args[1]) == limit
                and whole
                and (name == "aten::eq" or self.non_negative(source))
            ):
                self.assume_zero(source, ALL, depth + 1)

    def _assume_formula(self, formula: Any) -> None:
        if isinstance(formula, sympy.And):
            for each in formula.args:
                self._assume_formula(each)
            return
        if not isinstance(formula, sympy.core.relational.Relational):
            return
        difference = sympy.expand(formula.lhs - formula.rhs)
        if isinstance(formula, (sympy.Le, sympy.Lt, sympy.Eq)):
            self._not_positive.append(difference)
        if isinstance(formula, (sympy.Ge, sympy.Gt, sympy.Eq)):
            self._not_positive.append(-difference)
        symbols = list(difference.free_symbols)
        if len(symbols) != 1:
            self._assume_all(formula, difference)
            return
        symbol = symbols[0]
        if not symbol.is_integer and not isinstance(formula, sympy.Eq) and difference.subs(symbol, 0) != 0:
            return  # numbers between 0 and 1 are in it, too
        # A linear relation holds on a half-line or in one point: where 0 is in it and 1 is not, 0 is all of it.
        if not difference.is_polynomial(symbol) or sympy.degree(difference, symbol) != 1:
            return
        relation = type(formula)(difference, 0)
        if relation.subs(symbol, 0) == sympy.true and relation.subs(symbol, 1) == sympy.false:
            made = self.program.made.get(symbol)
            if made is None or not (isinstance(relation, sympy.Eq) or self._counts(symbol, made)):
                return
            self._sizes.add(symbol)
            self._no_rows(symbol, made)

    def _assume_all(self, formula: Any, difference: Any) -> None:
        """Of counts that add up to nothing, each is 0."""
        if isinstance(formula, (sympy.Ge, sympy.Gt)):
            difference = -difference
        terms = difference.as_coefficients_dict()
        if not isinstance(formula, (sympy.Eq, sympy.Le, sympy.Ge)) or any(
            number <= 0 for number in terms.values()
        ):
            return
        made = {symbol: self.program.made.get(symbol) for symbol in terms}
        if all(node is not None and self._counts(symbol, node) for symbol, node in made.items()):
            for symbol, node in made.items():
                self._sizes.add(symbol)
                self._no_rows(symbol, node)  # type: ignore[arg-type]

    def _no_rows(self, symbol: sympy.Symbol, made: fx.Node) -> None:
        """What a size of 0 says of the tensors that it came from."""
        mask = views.selecting_mask(made, symbol)
        if mask is not None and self.program.unchanged_since(mask, made):
            self.assume_zero(mask)
        elif name_of(made) in ("aten::item", "aten::_local_scalar_dense"):
            source = made.args[0]
            if isinstance(source, fx.Node) and self.program.unchanged_since(source, made):
                self.assume_zero(source)
